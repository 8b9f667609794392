"""An evaluation of your own: the share of answers that keep within a length, and of those that ask something.

dualign eval examples/evaluation.py:Brevity RUN                     # a run's own evaluations
dualign eval examples/evaluation.py:Brevity RUN longest=120         # ... by another setting
dualign eval examples/evaluation.py:Brevity MODEL --prompts PROMPTS.jsonl
dualign report RUN                                                  # its table and figure are on the page
"""

from collections.abc import Sequence

from dualign.eval.evaluation import Answer, Column, Evaluation, Plot, Result, Source, Table, per_prompt, share


class Brevity(Evaluation):
    name = "brevity"
    longest: int = 200  # a setting: `longest=120` on the command line

    def brief(self, answer: Answer) -> bool:
        return len(answer.text) <= self.longest

    def asks(self, answer: Answer) -> bool:
        return "?" in answer.text

    def run(self, sources: Sequence[Source]) -> Result:
        brief, asks = Column("brief [95 %]", "{:.1%}"), Column("asks [95 %]", "{:.1%}")
        columns = [Column("policy"), Column("batches"), brief, asks]
        plot = Plot("brevity", "batches", [brief.name, asks.name], "Brevity", "Shares of answers over online batches")
        rows, tables = [], []
        for source in sources:
            cells = []
            for policy in source.policies():  # of a run: π_0, then every evaluation
                shares = [share(per_prompt(policy, told)) for told in (self.brief, self.asks)]
                cells.append([policy.name, policy.batches, *shares])
                rows += [{"policy": policy.name, "id": a.prompt.id, "length": len(a.text)} for a in policy]
            notes = [f"brief: at most {self.longest} characters"]
            tables.append(Table("Brevity", columns, cells, notes, source.name, over="policy", plot=plot))
        last = tables[-1].rows[-1]
        return Result(rows, f"{brief.text(last[2])} of the last policy's answers are brief", tables)
