"""What simulations/README.md shows is what the stored runs say."""

import re
from pathlib import Path

import pytest

from hsplit_flwr.experiments.evidence.store import Store
from hsplit_flwr.experiments.main import main

SIMULATIONS = Path(__file__).resolve().parents[2] / "simulations"
README = (SIMULATIONS / "README.md").read_text(encoding="utf-8")
EVIDENCE = SIMULATIONS / "evidence"
OTHER_SOURCES = (
    "Does aggregation preserve the size of an update?",
    "Claim by claim",
    "Settings and their plans",
)
"""sections whose tables are not of stored runs"""
OTHERS = "hetlora,flora,flexlora,cenlora_small_batch,ft"
MAIN = (
    "--ours",
    "hsplitlora_all",
    "--rivals",
    f"splitlora_16,splitlora_16_pipelined,frozen_head,frozen_head_pipelined,{OTHERS}",
)
PIPELINED = ("--ours", "hsplitlora_keep_pipelined", "--rivals")
TABLES = {
    "results.csv": (
        MAIN,
        ("--ours", "hsplitlora", "--rivals", "splitlora_16,frozen_head"),
        ("--ours", "frozen_head_pipelined", "--rivals", "hsplitlora_all,splitlora_16,splitlora_16_pipelined"),
    ),
    "results_iid.csv": (MAIN,),
    "results_one_block.csv": (("--ours", "splitlora_16_pipelined", "--rivals", "splitlora_16"),),
    "wire.csv": (
        (
            *("--ours", "hsplitlora", "--rivals"),
            "hsplitlora_fp32,hsplitlora_int8,hsplitlora_int4,hsplitlora_step_ahead,splitlora_16,splitlora_16_int8",
        ),
        ("--ours", "hsplitlora_4_passes", "--rivals", "splitlora_4_passes,frozen_head_4_passes"),
    ),
    "parts.csv": (
        (
            *("--ours", "hsplitlora", "--rivals"),
            "with_joint_steps,with_deep_heads,without_one_alpha,without_going_on,splitlora,splitlora_joint,splitlora_as_released",
        ),
    ),
    "smollm2_wire.csv": (("--ours", "hsplitlora_int8", "--rivals", "hsplitlora_fp32"),),
    "settings.csv": (
        ("--ours", "hsplitlora_all", "--rivals", "splitlora_16,splitlora_16_pipelined,frozen_head_pipelined"),
        ("--ours", "frozen_head_pipelined", "--rivals", "hsplitlora_all,splitlora_16,splitlora_16_pipelined"),
    ),
    "settings_ablations.csv": (("--ours", "without_armsc", "--rivals", "without_naa"),),
    "settings_one_block.csv": (("--ours", "splitlora_16_pipelined", "--rivals", "splitlora_16"),),
    "settings_two_blocks.csv": (("--ours", "splitlora_16_pipelined", "--rivals", "splitlora_16"),),
    "settings_fitting_rank.csv": (("--ours", "splitlora", "--rivals", "splitlora_16"),),
    "settings_frozen.csv": (("--ours", "frozen_head", "--rivals", "splitlora_16"),),
    "settings_auto_heads.csv": (("--ours", "hsplitlora_auto_heads", "--rivals", "splitlora_16"),),
    "rules.csv": (
        (
            *("--ours", "hsplitlora_keep", "--rivals"),
            "hsplitlora,without_naa,with_fedex,with_ffa,with_fair,fedex_lora,ffa_lora,lora_fair",
        ),
    ),
    "deep_heads.csv": (
        ("--ours", "hsplitlora_keep", "--rivals", "one_model,hsplitlora,frozen_head"),
        (*PIPELINED, "one_model_pipelined,hsplitlora_pipelined,frozen_head_pipelined"),
    ),
    "deep_heads_120.csv": (
        ("--ours", "hsplitlora_keep", "--rivals", "one_model,hsplitlora"),
        (*PIPELINED, "one_model_pipelined,hsplitlora_pipelined,frozen_head_pipelined"),
    ),
    "deep_heads_400.csv": (
        ("--ours", "hsplitlora_keep", "--rivals", "one_model"),
        (*PIPELINED, "one_model_pipelined,frozen_head_pipelined"),
    ),
    "long.csv": (("--ours", "hsplitlora", "--rivals", "splitlora_16,frozen_head,hetlora,flora,ft"),),
    "e2e.csv": (("--ours", "hsplitlora", "--rivals", "splitlora_16,frozen_head"),),
    "e2e_whole.csv": (("--ours", "hetlora", "--rivals", "cenlora_small_batch"),),
    "e2e_absent.csv": (("--ours", "hsplitlora", "--rivals", "splitlora_16,frozen_head,hetlora"),),
    "twenty.csv": (
        ("--ours", "hsplitlora_all", "--rivals", "splitlora_16,splitlora_16_pipelined,frozen_head_pipelined"),
    ),
    "relexified_heads.csv": (
        ("--ours", "hsplitlora_keep", "--rivals", "one_model,hsplitlora,frozen_head"),
        (*PIPELINED, "one_model_pipelined,frozen_head_pipelined"),
    ),
    "relexified.csv": (
        MAIN,
        ("--ours", "hsplitlora", "--rivals", "hsplitlora_keep,splitlora_16,frozen_head"),
        (*PIPELINED, "splitlora_16_pipelined,frozen_head_pipelined"),
    ),
    "relexified_tight.csv": (
        ("--ours", "hsplitlora", "--rivals", "without_iwi,without_armsc,without_naa,splitlora,frozen_head"),
    ),
    "relexified_parts.csv": (("--ours", "hsplitlora", "--rivals", "without_iwi,with_shuffled_iwi,without_naa"),),
    "relexified_common.csv": (("--ours", "hsplitlora", "--rivals", "with_common_rank"),),
    "relexified_one_block.csv": (("--ours", "splitlora_16_pipelined", "--rivals", "splitlora_16"),),
    "short_rounds.csv": (("--ours", "hsplitlora_keep", "--rivals", "hsplitlora_keep_pipelined"),),
    "short_rounds_120.csv": (("--ours", "hsplitlora_keep", "--rivals", "hsplitlora_keep_pipelined"),),
}
"""store -> options of the tables that are shown of it, where they are not the default ones"""


def rows(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("|")]


def is_search(store: Path) -> bool:
    """Whether it has a method at several learning rates, or goes on where another search ended."""
    specs = [row.spec for row in Store(store).rows()]
    several = len({(s.method, s.learning_rate) for s in specs}) > len({s.method for s in specs})
    return several or store.stem.startswith("search_")


def rendered(store: Path, capsys: pytest.CaptureFixture[str]) -> str:
    if is_search(store):
        assert main(["search", str(store), "--markdown"]) == 0
    else:
        for options in TABLES.get(store.name, ((),)):
            assert main(["table", str(store), "--markdown", *options]) == 0
    return capsys.readouterr().out


def section(marker: str) -> str:
    """What stands between ``<!-- marker -->`` and ``<!-- end marker -->``."""
    found = re.search(rf"<!-- {marker} -->\n(.*?)<!-- end {marker} -->", README, re.DOTALL)
    assert found, marker
    return found[1]


def test_every_row_is_of_a_store(capsys: pytest.CaptureFixture[str]) -> None:
    known = {row for store in EVIDENCE.glob("*.csv") for row in rows(rendered(store, capsys))}
    shown = [row for part in README.split("\n## ") if not part.startswith(OTHER_SOURCES) for row in rows(part)]
    assert len(shown) > 200
    assert [row for row in shown if row not in known] == []


@pytest.mark.parametrize(
    ("marker", "store"),
    [
        ("rates", "rates"),
        ("results", "results"),
        ("results iid", "results_iid"),
        ("results at one block", "results_one_block"),
        ("wire", "wire"),
        ("parts", "parts"),
        ("twenty", "twenty"),
        ("metar", "metar_control"),
        ("search of metar", "search_metar"),
        ("metar 400", "metar_control_400"),
        ("search of metar 400", "search_metar_400"),
        ("metar short", "metar_short"),
        ("relexified control", "relexified_control"),
        ("relexified heads", "relexified_heads"),
        ("relexified in short rounds", "relexified_short"),
        ("relexified where memory binds", "relexified_tight"),
        ("relexified parts", "relexified_parts"),
        ("relexified, one rank for all heads", "relexified_common"),
        ("search of one rank for all heads", "search_relexified_common"),
        ("search of relexified where memory binds", "search_relexified_tight"),
        ("search of relexified where memory binds, more", "search_relexified_tight_more"),
        ("relexified short", "search_relexified_short"),
        ("search of relexified", "search_relexified"),
        ("search of relexified more", "search_relexified_more"),
        ("relexified", "relexified"),
        ("relexified at one block", "relexified_one_block"),
        ("short rounds", "short_rounds"),
        ("short rounds 120", "short_rounds_120"),
        ("exchange", "exchange"),
        ("settings", "settings"),
        ("rules", "rules"),
        ("search of rules", "search_rules"),
        ("deep heads", "deep_heads"),
        ("search of deep heads", "search_deep_heads"),
        ("search of deep heads 120", "search_deep_heads_120"),
        ("deep heads 400", "deep_heads_400"),
        ("search of deep heads 400", "search_deep_heads_400"),
        ("deep heads frozen 400", "deep_heads_frozen_400"),
        ("search of frozen heads 400", "search_frozen_400"),
        ("search of one model 400", "search_one_model_400"),
        ("long", "long"),
        ("long rates", "long_rates"),
        ("long ft rates", "long_ft_rates"),
        ("e2e", "e2e"),
        ("e2e rates", "e2e_rates"),
        ("search of e2e splitlora", "search_e2e_splitlora"),
        ("search of e2e frozen", "search_e2e_frozen"),
        ("e2e at one block", "e2e_one_block"),
        ("e2e whole rates", "e2e_whole_rates"),
        ("search of e2e hetlora", "search_e2e_hetlora"),
        ("e2e whole", "e2e_whole"),
        ("e2e absent", "e2e_absent"),
    ],
)
def test_a_marked_section_is_of_its_store(marker: str, store: str, capsys: pytest.CaptureFixture[str]) -> None:
    """No row of another store, and the whole first table: every method's final perplexity. No row before any run."""
    shown, path = rows(section(marker)), EVIDENCE / f"{store}.csv"
    if not path.exists():
        assert not shown
        return
    text = rendered(path, capsys)
    first_table = next(part for part in text.split("\n\n") if part.startswith("|"))
    assert set(rows(first_table)) <= set(shown) <= set(rows(text))
