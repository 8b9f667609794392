"""From a judge's words to a number, by written rules tried in order. What is ambiguous is absent, never guessed.

Score rules (the first that finds something decides):
  1. a statement about the whole: "Overall score: 7", "Final rating - 7/10"
  2. a last line that is nothing but a labelled score: "SCORE: 7"
  3. labelled scores anywhere: "score is 7", "Rating: **8**", "Bewertung: 8", "评分：8"
  4. out of ten: "7/10", "7 out of 10", "7 von 10", "8分"
  5. the whole reply is a number or a number word: "8.5", "[[8]]", "\\boxed{8}", "ten"
  6. a verb of judging: "I'd give it an 8", "deserves a 4"
  7. a number first, then the reasons: "8\n\nThe response ...", "8 - clear and kind"
Within a rule every statement must name the same value; two values, a range ("6 or 7"), another scale ("4/5", "70%")
or a value outside the scale make the reply absent, with that reason.

Before the rules: reasoning blocks are removed (an unclosed one is a cut-off reply), as are quoted text, block quotes,
code blocks, and everything between the request's own fence marks: what a judge quotes is not what it says.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass

NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
WORDS = {name: number for number, name in enumerate(NAMES)}
NUMBER = rf"(?:-?\d+(?:\.\d+)?|(?:{'|'.join(WORDS)})\b)"
LABEL = (
    r"(?:scores?|scored|rating|rated|grade|puntuación|puntaje|calificación|bewertung|punktzahl|punteggio|"
    r"pontuação|оценка|балл|评分|分数|得分|評分|分數|スコア|評価|点数|점수|평점)"
)
LINK = (
    r"(?:[-–—](?=\d))?[\"'\])]*\s*(?:(?:is|would be|will be|of|as|ist|est|es|é|è|在|是|为|為|は|は)\b)?"
    r"\s*[:=]*\s*(?:[-–—]+\s+|->\s*)?(?:an?\s+)?[\"'(\[]*"
)
VERB = r"\b(?:give|gave|rate|assign|award|deserves?|gets?|earns?|receives?|merits?|score)\b"
AFTER = r"\s*(?:$|[^\w\s]|(?:out|because|for|since|as|on|due|and|but|or|to|overall)\b)"  # not "gets 3 facts wrong"
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


def score(reply: str, *, low: float = 1, high: float = 10, cut: bool = False, echo: str = "") -> Extracted:
    """The one score that `reply` states on the scale low..high. `cut`: the server stopped at max_tokens.
    `echo`: the text that was judged; a judge that repeats it whole is not speaking for itself."""
    text, reason = clean(reply, echo)
    if reason:
        return Extracted(None, reason)
    for rule, statements in SCORE_RULES:
        tails = list(statements(_without_scale(text, high)))
        found = [_read(tail, high) for tail in tails]
        if not found:
            continue
        reasons = [why for _, why, _ in found if why]
        if reasons:
            return Extracted(None, reasons[0])
        values = {value for value, _, _ in found}
        if len(values) > 1:
            return Extracted(None, "two different scores")
        value = values.pop()
        assert value is not None
        if cut and not found[-1][2].strip() and text.endswith(tails[-1].strip()):
            return Extracted(None, "cut off at the score")  # "1" may have become "10"
        if not low <= value <= high:
            return Extracted(None, f"score outside {low:g}-{high:g}")
        return Extracted(value, rule=rule)
    return Extracted(None, _why_nothing(text, cut, "no score in the reply"))


def choice(reply: str, *, asks: str = "winner", cut: bool = False, echo: str = "") -> Extracted:
    """1 or 2: which response the judge named. `asks` says whether the question was for the "winner" or the "loser",
    so that "Response 1 is worse" is read only where the worse one was asked for.

    Rules, in order: a labelled answer ("Preferred Response=2", "Answer: 1", "[[2]]"), the whole reply, a number
    first and then the reasons, "Response 1 is better", "I prefer the second". Both named: absent.
    """
    text, reason = clean(reply, echo)
    if reason:
        return Extracted(None, reason)
    text = re.sub(r"\bfirst\b", "1", re.sub(r"\bsecond\b", "2", text, flags=re.I), flags=re.I)
    text = re.sub(
        r"\bone\b(?=\W*$)|(?<=response )one\b", "1", re.sub(r"\btwo\b(?=\W*$)", "2", text, flags=re.I), flags=re.I
    )
    good, bad = (BETTER, WORSE) if asks == "winner" else (WORSE, BETTER)
    if re.search(r"(?i)^\W*(?:both|neither|tie|equal|none)\b|\b(?:it'?s a tie|equally (?:good|harmful|helpful))", text):
        return Extracted(None, "the judge named neither")
    for rule, pattern in _choice_rules(good):
        named = {m.group("n") for m in pattern.finditer(text)}
        if len(named) > 1:
            return Extracted(None, "both responses named")
        if named:
            return Extracted(float(named.pop()), rule=rule)
    if re.search(rf"(?i){THING}\W*[12]\W+(?:is|was|seems)\b[^.\n]*?{bad}", text):
        return Extracted(None, "answers another question")
    return Extracted(None, _why_nothing(text, cut, "no choice in the reply"))


def clean(reply: str, echo: str = "") -> tuple[str, str | None]:
    """The judge's own words, and the reason why there are none."""
    text = unicodedata.normalize("NFKC", reply).replace("\u200b", "").replace("’", "'").replace("，", ",")
    if not text.strip():
        return "", "empty reply"
    text = re.sub(r"(?s)<<<(\w+ [0-9a-f]{16})>>>.*?(?:<<<END \1>>>|$)", " ", text)
    judged = unicodedata.normalize("NFKC", echo).replace("’", "'").strip()
    if len(judged) >= 12 and len(text.strip()) > len(judged):
        text = text.replace(judged, " ")
    text = re.sub(r"(?is)<(think|thinking|reasoning|analysis)>.*?</\1>", " ", text)
    text = re.split(r"(?i)</(?:think|thinking|reasoning|analysis)>", text)[-1]  # the template opened the block
    if re.search(r"(?i)<(?:think|thinking|reasoning|analysis)>", text):
        return "", "cut off while reasoning"
    if not text.strip():
        return "", "empty reply"
    text = re.sub(r"\\boxed\{([^{}]*)\}", r"\1", text)
    if not re.fullmatch(r"(?s)\s*```\w*\n?[^`]{0,80}```\s*", text):
        text = re.sub(r"(?s)```.*?(?:```|$)", " ", text)
    text = re.sub(r"(?m)^\s*>.*$", " ", text)
    if not re.fullmatch(r"\W*[\w./ ]{1,12}\W*", text):  # a short reply may itself stand in quotes
        text = re.sub(r"\"(?=[^\"]*[^\W\d_])(?!\w+\"\s*:)[^\"]+\"|“[^”]+”|«[^»]+»|„[^“”]+[“”]|「[^」]+」", " ", text)
        text = re.sub(r"(?<!\w)'[^'\n]*\d[^'\n]*'(?!\w)", " ", text)
    text = re.sub(r"[*_`#~$]+", "", text)
    text = re.sub(r"(\d),(\d)(?=\s*/|\s*(?:von|sur|de|su|из)\b)|(\d),(5)\b", r"\1\3.\2\4", text)  # 7,5: a decimal
    return text.strip(), None if text.strip() else "nothing but quoted text"


def _read(tail: str, high: float) -> tuple[float | None, str | None, str]:
    """The number that `tail` begins with: (value, why not, what follows it)."""
    match = re.match(rf"(?i){NUMBER}", tail)
    assert match
    rest = tail[match.end() :]
    if re.match(
        rf"(?i)\s*(?:-|–|—|~|,|&|to\b|or\b|and\b|bis\b|oder\b|ou\b|à\b|o\b|или\b|或|到|か)\s*(?:an?\s+)?{NUMBER}(?!\.\s+\w)",
        rest,
    ):
        return None, "two scores", rest
    if re.match(r"(?i)\s*(?:percent\b|%)|\s*\*|\s*stars?\b", rest):
        return None, "another scale", rest
    scale = re.match(rf"(?i)\s*(?:/|out of|von|sur|de|su|из|von)\s*({NUMBER})", rest)
    if scale and _number(scale[1]) != high:
        return None, "another scale", rest
    return _number(match[0]), None, rest


def _number(text: str) -> float:
    return float(WORDS.get(text.lower(), text))


def _without_scale(text: str, high: float) -> str:
    """Mentions of the scale itself ("from 1 to 10", "(1-10)") are not scores."""
    scale = rf"\b(?:0|1|one)\s*(?:-|–|to|and|bis|à|a)\s*(?:{high:g}|ten)\b"
    text = re.sub(rf"(?i)\((?:[^()\d]*){scale}[^()\d]*\)", " ", text)
    return re.sub(rf"(?i)(?:\b(?:on|from|between|using|a|the|scale|of|range)\s+)+{scale}\s*(?:scale)?,?", " ", text)


def _statements(pattern: str) -> Callable[[str], Iterator[str]]:
    """All tails (a number and what follows on its line) that `pattern` finds; one line may hold several."""
    compiled = re.compile(rf"(?i){pattern}")

    def find(text: str) -> Iterator[str]:
        start = 0
        while match := compiled.search(text, start):
            yield match["tail"]
            start = match.start("tail") + 1

    return find


def _last_line(text: str) -> Iterator[str]:
    match = re.fullmatch(
        rf"(?i)\W*{LABEL}{LINK}(?P<tail>{NUMBER}(?:\s*(?:/|out of)\s*\w+)?)\W*", text.splitlines()[-1].strip()
    )
    if match:
        yield match["tail"]


def _leading(text: str) -> Iterator[str]:
    """ "8. It is clear" continues the prompt's "SCORE:"; "1. Coherence ..." is a list."""
    if len(re.findall(r"(?m)^\s*\d+[.)]\s", text)) > 1 or re.match(r"1[.)]\s", text):
        return
    match = re.match(rf"(?i)[^\w-]*(?P<tail>{NUMBER}(?:\s*\n|\s*[-–—:,;.(]\s|\s*$)[\s\S]*)", text)
    if match:
        yield match["tail"]


def _whole(text: str) -> Iterator[str]:
    match = re.fullmatch(rf"(?i)[^\w-]*(?P<tail>{NUMBER})\W*", text)
    if match:
        yield match["tail"]
    elif re.fullmatch(rf"(?i)\W*(?:an?\s+)?{NUMBER}\s*(?:-|–|to|or|and|,|/)\s*(?:an?\s+)?{NUMBER}\W*", text):
        yield text[re.search(rf"(?i){NUMBER}", text).start() :]  # type: ignore[union-attr]


OUT_OF = r"(?:\s*(?:/|out of|von|sur|de|su|из)\s*(?:\d+|ten)|\s*(?:分|点|점))"
SCORE_RULES = (
    ("overall", _statements(rf"\b(?:overall|final|total)\s*(?:{LABEL}|answer|verdict){LINK}(?P<tail>{NUMBER}.*)")),
    ("last line", _last_line),
    ("label", _statements(rf"(?<![a-z]){LABEL}{LINK}(?P<tail>{NUMBER}.*)")),
    ("out of ten", _statements(rf"(?<![0-9A-Za-z./])(?P<tail>{NUMBER}{OUT_OF}.*)")),
    ("whole", _whole),
    ("verb", _statements(rf"{VERB}[^.\n\d]{{0,40}}?\b(?:an?\s+|as\s+)?(?P<tail>{NUMBER}(?={AFTER}).*)")),
    ("leading", _leading),
)

THING = r"\b(?:response|summary|answer|option|assistant|reply|completion|antwort|respuesta|réponse|ответ|回答)"
BETTER = r"\b(?:better|best|preferred|preferable|superior|stronger|(?:more|most) (?:helpful|honest|accurate|useful))\b"
WORSE = r"\b(?:worse|worst|(?:more|most) harmful|more dangerous|more offensive)\b"


def _choice_rules(good: str) -> list[tuple[str, re.Pattern[str]]]:
    n = r"(?P<n>[12])(?![\d.]*\d)(?!\s*(?:or|and|/|&)\s*[12])"
    named = rf"(?:preferred|better|best|chosen|selected|(?:more|most) \w+|final|my)\s+{THING}"
    kind = rf"(?:{named}|\b(?:choice|verdict|winner|pick))\s*(?:is|:|=)+|(?:{THING}|选择|答案)\s*[:=]+"
    very = r"(?:(?:clearly|much|slightly|the|by far|far|a bit)\s+)*"
    rules = {
        "label": rf"(?:{kind})\s*\W*(?:{THING}\s*)?{n}(?={AFTER})",
        "brackets": r"\[\[(?P<n>[12])\]\]",
        "whole": rf"\A\W*(?:the\s+)?(?:{THING}\s*)?{n}(?:\s*{THING})?\W*\Z",
        "leading": rf"\A\W*{n}\s*(?:\n|[-–—:.,;(]\s)(?![\s\S]*\n\W*[12][.):])",
        "leading words": rf"\A\W*{THING}\s*{n}\.?(?:\s*\n|,?\s+(?:because|since|as)\b)",
        "comparison": rf"(?:{THING}\s*|\bthe\s+){n}\s*(?:{THING})?\s+(?:is|was|seems|appears)\s+{very}{good}",
        "verb": rf"\b(?:prefer|choose|pick|select|go with|vote for)\s+(?:the\s+)?(?:{THING}\s*)?{n}",
    }
    return [(name, re.compile(rf"(?i){pattern}")) for name, pattern in rules.items()]


def _why_nothing(text: str, cut: bool, otherwise: str) -> str:
    if cut:
        return "cut off before an answer"
    return "refused" if REFUSAL.search(text) else otherwise
