"""Make data/published/papers.csv: figures of papers that 91_published sets beside ours.

    python data/build_papers.py TABLES.csv

TABLES.csv: one published figure a row, columns table_id, paper, year, arxiv, table, model, dataset,
method, setting, metric, value, unit, baseline_value, confidence. Taken are those whose confidence
is "high" (read in the source) and whose table and model stand below; fractions become percent.
"""

import argparse
from pathlib import Path

import pandas as pd

# id of the table: what of it, by a part of the model's name ("" takes all) and by metrics (all,
# where there are none)
TABLES = {
    "B0": ("ResNet",), "P1": ("", "params_pruned", "flops_pruned"),
    "P1s": ("ResNet-56", "top1_acc"),
    "P3": ("ResNet-56",),
    "Q2": ("v2_1_224",), "Q3": ("MobileNetV2",), "Q5": ("mobilenet_v2",), "Q6": ("MobileNetV2",),
    "Q8": ("Lite0",),
    "Q10": ("MobileNetV2",), "K1": ("resnet56->",), "K2": ("ResNet56->",), "N1": ("",),
    "N3": ("BERT",), "N9": ("",),
    "R1": ("", "throughput"), "S3": ("ResNet-20",), "V2": ("SimpleCNN", "codebook_usage"),
    "W3": ("DS-CNN",), "W4": ("VAD",)}
# not taken: a method that failed in the source itself, and distillation losses that the full run of
# 21_distillation leaves out
LEFT = ("act-order", "AT", "SP", "CC", "VID", "RKD", "PKT", "AB", "FT", "FSP", "NST", "CRD")
KEY = ["id", "subject", "setting", "metric"]


def _taken(row) -> bool:
    if row.confidence != "high" or row.table_id not in TABLES:
        return False
    model, *metrics = TABLES[row.table_id]
    return model in row.model and row.metric in (metrics
                                                 or [row.metric]) and not row.method.endswith(LEFT)


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tables", type=Path)
    parser.add_argument("--out", type=Path,
                        default=Path(__file__).parent / "published" / "papers.csv")
    options = parser.parse_args()
    given = pd.read_csv(options.tables, dtype=str).fillna("")
    chosen = given[[_taken(row) for row in given.itertuples()]]
    rows = [{"id": row.table_id, "subject": row.model,
             "setting": ", ".join(filter(None, (row.method, row.setting))),
             "metric": row.metric, "value": row.value, "unit": row.unit,
             "baseline": row.baseline_value, "dataset": row.dataset,
             "paper": ", ".join(filter(None, (row.paper, row.year, row.arxiv
                                              and f"arXiv {row.arxiv}", row.table)))}
            for row in chosen.itertuples()]
    papers = pd.DataFrame(rows)
    numbers = papers[["value", "baseline"]].apply(pd.to_numeric)
    fractions = papers.unit.eq("frac") | (papers.id.eq("Q2") & numbers.value.le(1))
    papers[["value", "baseline"]] = numbers.mul(fractions.map({True: 100, False: 1}),
                                                axis=0).round(6)
    papers.loc[fractions, "unit"] = "%"
    papers.drop_duplicates(KEY).to_csv(options.out, index=False)


if __name__ == "__main__":
    main()
