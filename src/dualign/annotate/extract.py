"""From a judge's words to a number, by written rules. What is ambiguous is absent, never guessed.

A reply can state its score in three kinds of ways:
  1. places: the whole reply ("8.5", "[[8]]", "\\boxed{8}", "ten"), its beginning ("8 - clear and kind", "SCORE: 8 because
     ..."), a line with nothing else on it ("SCORE: 7", "8/10", "Bewertung: 8", "评分：8")
  2. formal statements within a text: "Overall score: 7", "final rating is 7", "... SCORE: 7"
  3. the text itself: "the score is 7", "7 out of 10", "8分", "I'd give it an 8", "deserves a 4"
Kinds 1 and 2 decide together, and where there are any, kind 3 is not listened to (reasons mention other numbers). All
statements that decide must name one value; two values, a range ("6 or 7"), another scale ("4/5", "70%") or a value
outside the scale make the reply absent, with that reason. Within a text, a number that its sentence denies, supposes or
reports ("does not deserve a 10", "to reach a score of 9", "it claims that its score is 10") is no statement.

Before the rules: reasoning blocks are removed (an unclosed one is a cut-off reply), as are quoted text, block quotes,
code blocks, and everything between the request's own fence marks: what a judge quotes is not what it says. A reply that
is JSON, fenced or not, is read by its keys; one that states nothing else, by a JSON block that begins or ends it.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from dualign.annotate import statements
from dualign.annotate.reply import CUT_THINKING
from dualign.annotate.statements import CLOSING, REASONING

NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
WORDS = {name: number for number, name in enumerate(NAMES)}
NUMBER = rf"(?:-?\d+(?:\.\d+)?(?!\d|\.\d)|(?:{'|'.join(WORDS)})\b)"
OUT_OF = r"(?:\s*(?:/|out of|von|sur|de|su|из)\s*(?:\d+|ten)\b|\s*(?:分|点|점))"
LABEL = (
    r"(?:scores?|scored|rating|rated|grade|puntuación|puntaje|calificación|bewertung|punktzahl|punteggio|"
    r"pontuação|оценка|балл|评分|分数|得分|評分|分數|スコア|評価|点数|점수|평점)"
)
LINK = (
    r"(?:[-–—](?=\d))?[\"'\])]*\s*(?:(?:is|would be|will be|of|as|ist|est|es|é|è|在|是|为|為|は|は)\b)?"
    r"\s*[:=]*\s*(?:[-–—]+\s+|->\s*)?(?:an?\s+)?[\"'(\[]*"
)
VERB = r"\b(?:give|gave|rate|assign|award|deserves?|gets?|earns?|receives?|merits?|score)\b"
# what may follow a score in a text: not "gets 3 facts wrong", not "is one of the best"
AFTER = r"\s*(?:$|[^\w\s]|(?:out|because|for|since|as|on|due|and|but|or|to|overall)\b|[\u3040-\u30ff\u4e00-\u9fff\uac00-\ud7af])"
DENIED = re.compile(
    r"\b(?:not|never|no|cannot|without|if|unless|above|below|beyond|at least|at most|more than|less than|short of|"
    r"instead of|rather than|claims?|claimed|says|said|states|stated|tells|told|asks|asked|demands|requests|wants|insists|"
    r"instructs|suggests|argues|declares|writes|pretends|itself)\b|n't\b|(?<!\bi )\b(?:would|could|might|should)\b(?! be\b)|"
    r"\bto (?:reach|get|earn|deserve|achieve|receive|obtain|score|merit)\b",
    re.I,
)
REFUSAL = re.compile(
    r"\b(?:i(?: am|'m)? (?:cannot|can't|can not|won't|sorry|unable|not able)|unable to|as an ai|i must decline|"
    r"not comfortable|lo siento|je ne peux pas|ich kann (?:das |dies )?nicht|не могу)|无法|不能|抱歉|申し訳|죄송",
    re.I,
)


@dataclass(frozen=True)
class Extracted:
    value: float | None
    reason: str | None = None  # why there is none
    rule: str | None = None  # which rule found it
    silent: bool = False  # the reply states nothing: there is none, and none that was turned down


Rules = dict[str, re.Pattern[str]]


def _compile(**patterns: str) -> Rules:
    return {name.replace("_", " "): re.compile(rf"(?im){pattern}") for name, pattern in patterns.items()}


EXPRESSION = rf"(?P<n>{NUMBER}){OUT_OF}?"
PLACES = _compile(
    whole=rf"\A[^\w-]*(?:(?:final\s+)?answer\s*[:=]\s*)?(?:an?\s+)?{EXPRESSION}\W*\Z",
    range=rf"\A\W*(?:an?\s+)?(?P<n>{NUMBER})\s*(?:-|–|to|or|and|,|/)\s*(?:an?\s+)?{NUMBER}\W*\Z",
    line=rf"^[^\w\n]*(?:(?:my|the|your|final|overall|total)\s+)*{LABEL}{LINK}{EXPRESSION}[^\w\n]*$",
    bare_line=rf"^[^\w\n-]*{EXPRESSION}[^\w\n.)]*$",
    beginning=rf"\A[^\w-]*(?P<label>{LABEL}{LINK})?{EXPRESSION}"
    r"(?=\s*\n|\s*[-–—:;.!]+\s|,?\s*(?:because|since|as)\b|\s*\(\s*(?:out of|/))",
)
FORMAL = _compile(
    overall=rf"\b(?:overall|final|total)\s*(?:(?:{LABEL}|verdict){LINK}|[:=]+\s*)(?P<n>{NUMBER})(?={OUT_OF}?{AFTER})",
    asked=rf"(?<!\w)(?-i:SCORE)\s*[:=]+\s*[\"'(\[]*(?P<n>{NUMBER})(?={OUT_OF}?{AFTER})",
    line_start=rf"^[^\w\n]*(?:(?:my|the|your)\s+)?{LABEL}{LINK}(?P<n>{NUMBER})(?={OUT_OF}?{AFTER})",
)
PROSE = _compile(
    label=rf"(?<![a-z]){LABEL}{LINK}(?P<n>{NUMBER})(?={OUT_OF}?{AFTER})",
    out_of_ten=rf"(?<![0-9A-Za-z./-])(?P<n>{NUMBER}){OUT_OF}(?={AFTER})(?!/)",
    verb=rf"{VERB}[^.\n\d]{{0,40}}?(?<![\w.-])(?:an?\s+|as\s+)?(?P<n>{NUMBER})(?={OUT_OF}?{AFTER})",
)


SCORES = statements.Asked(
    keys=(re.compile(rf"(?i)(?:(?:final|overall|total|my|your|the)\s+)*{LABEL}|overall|final|total"),),
    value=re.compile(rf"(?i)\W*{NUMBER}{OUT_OF}?\W*"),
    label="score",
)


def score(
    reply: str, *, low: float = 1, high: float = 10, cut: bool = False, echo: str = "", echoes: Sequence[str] = ()
) -> Extracted:
    """The one score that `reply` states on the scale low..high. `cut`: the server stopped at max_tokens.
    `echo`, `echoes`: the text that was judged and its prompt; a judge that repeats them is not speaking for itself."""
    return _read_by(lambda text, cut: _score(text, low, high, cut), reply, cut, [echo, *echoes], SCORES)


def _read_by(
    rules: Callable[[str, bool], Extracted], reply: str, cut: bool, echoes: Sequence[str], asked: statements.Asked
) -> Extracted:
    """What `rules` find in a reply: in its JSON, where it is nothing else; in its words; in a JSON block beside them.
    JSON that can be read is whole, wherever the reply was cut off."""
    whole, reason = statements.of_reply(reply, cut, echoes)
    if whole is not None:
        return rules(_normal(statements.whole(whole, asked) or ""), False)
    own, reason = ("", reason) if reason else own_words(reply, echoes)
    if reason:
        return Extracted(None, reason)
    if (answers := statements.whole(own, asked)) is not None:
        return rules(answers, False)
    text = unquoted(own)
    nothing = Extracted(None, "cut off before an answer" if cut else "nothing but quoted text", silent=True)
    found = rules(text, cut) if text else nothing
    answers = statements.block(own, echoes, asked) if found.silent else None
    return rules(answers, False) if answers else found


def _score(text: str, low: float, high: float, cut: bool) -> Extracted:
    text = _without_scale(text, high)
    found = [*_find(text, PLACES, spoken=False), *_find(text, FORMAL)]
    if found:
        later = list(_find(text, {"out of ten": PROSE["out of ten"]}))
        found += [(rule, other) for rule, other in later if any(_on_its_line(text, m, other) for _, m in found)]
    else:
        found = list(_find(text, PROSE))
    if not found:
        return Extracted(None, _why_nothing(text, cut, "no score in the reply"), silent=True)
    read = [_read(text, m, high) for _, m in found]
    if reasons := [why for _, why in read if why]:
        return Extracted(None, reasons[0])
    values = {value for value, _ in read}
    if len(values) > 1:
        return Extracted(None, "two different scores")
    value = values.pop()
    assert value is not None
    if cut and any(not text[m.end("n") :].strip() for _, m in found):
        return Extracted(None, "cut off at the score")  # "1" may have become "10"
    if not low <= value <= high:
        return Extracted(None, f"score outside {low:g}-{high:g}")
    return Extracted(value, rule=found[0][0])


def _on_its_line(text: str, statement: re.Match[str], other: re.Match[str]) -> bool:
    """Whether `other` stands later on the line of `statement`."""
    end, start = statement.end("n"), other.start("n")
    return end < start and "\n" not in text[end:start]


def _find(text: str, rules: Rules, spoken: bool = True) -> Iterator[tuple[str, re.Match[str]]]:
    """Every statement that `rules` find. `spoken`: one within a sentence, which may deny, suppose or report it."""
    for rule, pattern in rules.items():
        start = 0
        while match := pattern.search(text, start):
            start = match.start("n") + 1
            listed = rule == "beginning" and not match["label"] and _is_list(text)
            if not listed and not (spoken and DENIED.search(_sentence(text, match))):
                yield rule, match


def _sentence(text: str, match: re.Match[str]) -> str:
    """What the sentence says before the number."""
    return re.split(r"[.!?;]\s|\n", text[: match.start("n")])[-1]


def _is_list(text: str) -> bool:
    """ "8. It is clear" continues the prompt's "SCORE:"; "1. Coherence ..." is a list."""
    return len(re.findall(r"(?m)^\s*\d+[.):]\s", text)) > 1 or bool(re.match(r"1[.):]\s", text))


def _read(text: str, match: re.Match[str], high: float) -> tuple[float | None, str | None]:
    """The number of a statement, or why it is no score."""
    rest = text[match.end("n") :].split("\n", 1)[0]
    many = r"(?:-|–|—|~|,|&|to\b|or\b|and\b|bis\b|oder\b|ou\b|à\b|o\b|или\b|或|到|か)"
    if re.match(rf"(?i)\s*{many}\s*(?:an?\s+)?{NUMBER}(?!\.\s+\w)", rest):
        return None, "two scores"
    if re.match(r"(?i)\s*(?:percent\b|%)|\s*\*|\s*stars?\b", rest):
        return None, "another scale"
    scale = re.match(rf"(?i)\s*(?:/|out of|von|sur|de|su|из)\s*({NUMBER})", rest)
    if scale and _number(scale[1]) != high:
        return None, "another scale"
    return _number(match["n"]), None


def _number(text: str) -> float:
    return float(WORDS.get(text.lower(), text))


def _without_scale(text: str, high: float) -> str:
    """Mentions of the scale itself ("from 1 to 10", "(1-10)") are not scores."""
    scale = rf"\b(?:0|1|one)\s*(?:-|–|to|and|bis|à|a)\s*(?:{high:g}|ten)\b"
    text = re.sub(rf"(?i)\((?:[^()\d]*){scale}[^()\d]*\)", " ", text)
    return re.sub(rf"(?i)(?:\b(?:on|from|between|using|a|the|scale|of|range)\s+)+{scale}\s*(?:scale)?,?", " ", text)


THING = r"\b(?:response|summary|answer|option|assistant|reply|completion|antwort|respuesta|réponse|ответ|回答)"
ONE = r"(?P<n>[12])(?![\d.]*\d)(?!\s*(?:or|and|/|&|,)\s*[12])"
LITERAL = r"preferred\s+(?:response|summary)\s*[=:]+"  # how the built-in prompts end
WHOLE = {  # which of the two, all things considered
    "winner": r"(?:better|best|preferred|preferable|superior)",
    "loser": r"(?:worse|worst|(?:more|most) harmful)",
}
ASPECT = {
    "winner": r"(?:stronger|(?:more|most) (?:helpful|honest|accurate|useful))",
    "loser": r"(?:(?:more|most) (?:dangerous|offensive)|less safe|(?:more|most) unsafe)",
}


def _choice_rules(asks: str) -> tuple[Rules, Rules, Rules, Rules]:
    """Places, formal statements, verdicts in a text, and single aspects in a text."""
    very = r"(?:(?:clearly|much|slightly|the|by far|far|a bit)\s+)*"
    named = rf"(?:{WHOLE[asks]}|{ASPECT[asks]}|chosen|selected|final|my)\s+(?:{THING}|choice|verdict|pick)\b"
    label = rf"(?:{LITERAL}|(?:{named}|\b(?:choice|verdict|pick{'|winner' if asks == 'winner' else ''}))\s*(?:is|:|=)+)"
    compared = rf"(?:{THING}\s*|\bthe\s+){ONE}\s*(?:{THING})?\s+(?:is|was|seems|appears)\s+{very}"
    places = _compile(
        whole=rf"\A\W*(?:the\s+)?(?:{THING}\s*)?{ONE}(?:\s+one|\s*{THING})?\W*\Z",
        line=rf"^\W*(?:{label}|(?:{THING}|选择|答案)\s*[:=]+)\s*\W*(?:{THING}\s*)?{ONE}[^\w\n]*$",
        bare_line=rf"^[^\w\n]*(?:{THING}\s*)?{ONE}[^\w\n.:)]*$",
        brackets=r"\[\[(?P<n>[12])\]\]",
        beginning=rf"\A\W*(?P<label>{label}\s*\W*(?:{THING}\s*)?)?{ONE}(?=\s*\n|\s*[-–—:.;]\s|,?\s*(?:because|since|as)\b)",
        beginning_words=rf"\A\W*{THING}\s*{ONE}(?=\.?\s*\n|,?\s+(?:because|since|as)\b)",
    )
    formal = _compile(
        label=rf"(?:{label}|^\W*(?:{THING}|选择|答案)\s*[:=]+)\s*\W*(?:{THING}\s*)?{ONE}(?={AFTER})",
    )
    verb = rf"\b(?:prefer|choose|pick|select|go with|vote for)\s+(?:the\s+)?(?:{THING}\s*)?{ONE}"
    verdicts = _compile(comparison=rf"{compared}{WHOLE[asks]}\b", **({"verb": verb} if asks == "winner" else {}))
    return places, formal, verdicts, _compile(aspect=rf"{compared}{ASPECT[asks]}\b")


CHOICE_RULES = {asks: _choice_rules(asks) for asks in WHOLE}


def _choice_keys(asks: str) -> statements.Asked:
    kind = rf"(?:{WHOLE[asks]}|{ASPECT[asks]}|chosen|selected|final|my)"
    bare = "choice|verdict|pick|preference" + (
        "|winner|preferred|better|best" if asks == "winner" else "|worse|worst|loser"
    )
    telling = (
        rf"(?i)(?:the\s+)?(?:preferred\s+(?:response|summary)|{kind}\s+(?:{THING}|choice|verdict|pick)|{bare}|选择)"
    )
    return statements.Asked(
        keys=(re.compile(telling), re.compile(rf"(?i){THING}|答案")),
        value=re.compile(rf"(?i)\W*(?:(?:{THING}\s*)?[12]|(?:response|summary|answer|option) (?:one|two))\W*"),
        label="choice",
    )


CHOICES = {asks: _choice_keys(asks) for asks in WHOLE}


def choice(reply: str, *, asks: str = "winner", cut: bool = False, echoes: Sequence[str] = ()) -> Extracted:
    """1 or 2: which response the judge named. `asks` says whether the question was for the "winner" or the "loser",
    so that "Response 1 is worse" is read only where the worse one was asked for.

    As for scores: an answer in its place ("1", "Preferred Response=2", "[[2]]") or a formal one decides, else the
    verdict of the text ("Response 1 is better", "I prefer the second"), else a single aspect of it. Both named, or an
    answer that the text's verdict contradicts: absent.
    """
    return _read_by(lambda text, cut: _choice(text, asks, cut), reply, cut, echoes, CHOICES[asks])


def _choice(text: str, asks: str, cut: bool) -> Extracted:
    text = _ordinals(text)
    if re.search(r"(?i)^\W*(?:both|neither|tie|equal|none)\b|\b(?:it'?s a tie|equally (?:good|harmful|helpful))", text):
        return Extracted(None, "the judge named neither")
    places, formal, verdicts, aspects = CHOICE_RULES[asks]
    found = [*_find(text, places, spoken=False), *_find(text, formal)]
    spoken = list(_find(text, verdicts))
    if not {m["n"] for _, m in found} & {
        m["n"] for _, m in spoken
    }:  # a verdict for both says nothing against the answer
        found += spoken
    found = found or list(_find(text, aspects))
    named = {m["n"] for _, m in found}
    if len(named) > 1:
        return Extracted(None, "both responses named")
    if named:
        return Extracted(float(named.pop()), rule=found[0][0])
    other = "loser" if asks == "winner" else "winner"
    if any(True for rules in CHOICE_RULES[other][2:] for _ in _find(text, rules)):
        return Extracted(None, "answers another question")
    return Extracted(None, _why_nothing(text, cut, "no choice in the reply"), silent=True)


def _ordinals(text: str) -> str:
    """The number words that name a response, as digits; not the "first" that opens a list of reasons."""
    digits = {"first": "1", "one": "1", "second": "2", "two": "2"}
    word = r"(first|second|one|two)"
    for pattern in (
        rf"\b{word}(?=\s+{THING})",
        rf"(?:(?<=response )|(?<=summary )|(?<=answer )|(?<=option )|(?<=prefer the )|(?<=choose the )){word}\b",
        rf"(?:(?<=\A)|(?<=\Athe )){word}(?=(?:\s+one)?\W*\Z)",
    ):
        text = re.sub(rf"(?i){pattern}", lambda m: digits[m[1].lower()], text)
    return text


def own_words(reply: str, echoes: Sequence[str]) -> tuple[str, str | None]:
    """The reply without its reasoning and the judged texts that it repeats, and the reason why nothing is left."""
    text = _normal(reply).replace("\u200b", "").replace("，", ",").replace("−", "-")
    if not text.strip():
        return "", "empty reply"
    text = re.sub(r"(?s)<<<(\w+ [0-9a-f]{16})>>>.*?(?:<<<END \1>>>|$)", " ", text)
    for echo in echoes:
        judged = _normal(echo).strip()
        if len(judged) >= 12 and len(text.strip()) > len(judged):
            text = text.replace(judged, " ")
    text = re.sub(rf"(?is)[<\[]({REASONING})[>\]].*?[<\[]/\1[>\]]", " ", text)
    text = re.split(rf"(?i)[<\[]/{REASONING}[>\]]", text)[-1]  # the template opened the block
    if re.search(rf"(?i)[<\[]{REASONING}[>\]]", text):
        return "", CUT_THINKING
    # single blanks: rules may step over white space in several ways, and a run of it would try them all
    text = re.sub(r"[^\S\n]+", " ", re.sub(r"\s*\n\s*", "\n", text))
    text = CLOSING.sub("", text)
    return text, None if text.strip() else "empty reply"


def unquoted(text: str) -> str:
    """The judge's own words, without what it quotes and the marks that set a text."""
    text = re.sub(r"\\boxed\{([^{}]*)\}", r"\1", text)
    if not re.fullmatch(r"(?s)\s*```\w*\n?(?:[^`]{0,80}|\s*\{[^`]*\}\s*)```\s*", text):
        text = re.sub(r"(?s)```.*?(?:```|$)", " ", text)
    text = re.sub(r"(?m)^\s*>.*$", " ", text)
    if not re.fullmatch(r"\W*[\w./ ]{1,12}\W*", text):  # a short reply may itself stand in quotes
        text = re.sub(r"\"(?=[^\"]*[^\W\d_])(?!\w+\"\s*:)[^\"]+\"|“[^”]+”|«[^»]+»|„[^“”]+[“”]|「[^」]+」", " ", text)
        text = re.sub(r"(?<!\w)'[^'\n]*\d[^'\n]*'(?!\w)", " ", text)
    text = re.sub(r"[*_`#~$]+", "", text)
    text = re.sub(r"(\d),(\d)(?=\s*/|\s*(?:von|sur|de|su|из)\b)|(\d),(5)\b", r"\1\3.\2\4", text)  # 7,5: a decimal
    return text.strip()


def _normal(text: str) -> str:
    return unicodedata.normalize("NFKC", text).replace("’", "'")


def _why_nothing(text: str, cut: bool, otherwise: str) -> str:
    if cut:
        return "cut off before an answer"
    return "refused" if REFUSAL.search(text) else otherwise
