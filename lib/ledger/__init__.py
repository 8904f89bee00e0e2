"""The ledger: every claim, the rows that decide it, the verdict that follows from them.

    python -m lib.ledger [--write]

Two tables in `data/published`: `claims.csv`, the claims of the three papers, and
`our_claims.csv`, those of this repository. What is claimed and which rows decide is
written by hand; the columns `COMPUTED` are filled from committed rows, by the rule of
`lib.verdicts`. A claim that says two things has a row for each (S11a, S11b).

kind       rows                    filter
contrast   of `data/results`       a registered contrast, or `LEFT - RIGHT [before]`,
                                   before fine-tuning; then columns, `; share=0.5`
loss       of `data/results`       `LEFT - RIGHT` at any cost: LEFT loses at most
                                   `margin`; RIGHT `any`: the best network of all
fit        of `data/results`       `product` or `lines`, see `map3d.find_misfit`
ranks      of `data/results`       `LEFT - RIGHT`, rank correlations, mean over layers;
                                   or leads, which are differences in points already
bound      of `data/results`       `ARM: COLUMN`: the largest of a base is at most
                                   `margin`; ARM `any`: the best arm of each base
ratio      of `data/results`       `ARM: COLUMN / ARM: COLUMN`, at most `margin`; on
                                   each base the means of both sides
speed      of `data/results`       `LEFT - RIGHT`: epochs that RIGHT needs more to the
                                   accuracy that both reach
size       of `data/published`     `net=NET [variant=] rate= [layers=] [quantity=]`
latency    of `data/results`       `column=value ...`, the networks timed in runtimes
test       a file of `tests`       the test that decides
none                               `not tested` or `not testable here`

`not` in front of a contrast or a test asks for the opposite. Several files, networks or
right-hand arms are joined by "|". `n` counts bases, of `size` printed numbers; `low`
and `high` are the interval that decides, corrected for all that was asked of its rows.
"""

from lib.ledger.judging import COMPUTED, TABLES, compute, list_changes, main, read
from lib.ledger.rows import ENOUGH, pick_rates, read_contrasts, read_rows
