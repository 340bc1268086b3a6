"""Runs that are killed or whose checkpoints are damaged end as if nothing had happened; what the committed records count is what their rows say."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CAMPAIGNS = Path(__file__).parent / "campaigns"
SIGKILL, SIGTERM = 9, 143  # as subprocess gives the one, as a shell gives the other


def recorded(name): return json.loads((CAMPAIGNS / "results" / f"{name}.json").read_text())


def check_kills(found, kills):
    "Every row is a kill that came, and an end; `equal` and the table follow from them."
    rows, phases = found["rows"], {}
    for r in rows:
        assert r["code"] == -SIGKILL and f"{r['moment']['phase']} {r['moment']['entry']}" in r["killed_in"].split(" > "), r  # inside the phase, not after it
        assert r["equal"] == (r["last_code"] == 0 and not r["differs"] and r["each_picture_once_an_epoch"]), r
        n, equal = phases.get(r["moment"]["phase"], (0, 0))
        phases[r["moment"]["phase"]] = n + 1, equal + r["equal"]
    phases["all"] = len(rows), sum(r["equal"] for r in rows)
    assert found["by_phase"] == {p: {"kills": n, "equal": equal} for p, (n, equal) in phases.items()} and phases["all"] == (kills, kills)
    assert found["second_kills"] == sum(bool(r["second"]) and r["second"]["code"] == -SIGKILL for r in rows)


def check_damages(found, files, ways):
    "Every row of a damage says how it ended and which file was at fault; the counts follow from them."
    controls, rows = [r for r in found["rows"] if r["file"] == "(control)"], [r for r in found["rows"] if r["file"] in files]
    newest, before = found["sigterm"]["checkpoints"][::-1]
    assert found["sigterm"]["code"] == SIGTERM and "_update_" in newest
    assert [(r["outcome"], r["came_from"], r["differs"]) for r in controls] == [("silent, same result", newest, []), ("silent, same result", before, [])]
    for r in rows:
        bitwise = r["code"] == 0 and r["came_from"] == before and r["set_aside"] == [f"damaged_{newest}_1"] and not r["differs"]
        assert (r["outcome"] == "recovered from the one before, bitwise") == bitwise and r["names_the_file"] == (r["file"] in r["says"]), r
    assert found["counts"] == {outcome: sum(r["outcome"] == outcome for r in rows) for outcome in found["counts"]} and sum(found["counts"].values()) == len(rows)
    assert {(r["file"], r["damage"]) for r in rows} == ways and len(rows) == len(ways) == found["counts"]["recovered from the one before, bitwise"]
    last = found["all_damaged"]
    assert last["codes"] == [2, 2] and last["nothing_deleted"] and "none of its 2 checkpoints is whole" in last["says"][0] and all(name.startswith("damaged_") for name in last["set_aside"])


FILES, WAYS = ("policy/model.safetensors", "optimizer.safetensors", "rank_0.safetensors", "state.json", "manifest.json"), ("cut to half", "removed", "bit flipped")


def test_the_record_of_kills_is_what_its_rows_say():
    found = recorded("kill9")
    check_kills(found, 50)
    assert len(found["by_phase"]) == 15 and len({r["configuration"] for r in found["rows"]}) == 3 and {r["last_process"] for r in found["rows"]} == {"forked", "by itself"}


def test_the_record_of_damages_is_what_its_rows_say(): check_damages(recorded("damage"), FILES, {(file, way) for file in FILES for way in WAYS})


def campaign(script, *options, into):
    done = subprocess.run([sys.executable, "-W", "ignore", str(CAMPAIGNS / script), *options, "--record", str(into)], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(into.read_text())


@pytest.mark.slow
def test_kills_in_six_phases(tmp_path):
    found = campaign("kill9.py", "--kills", "6", "--configurations", "1", into=tmp_path / "kill9.json")
    check_kills(found, 6)
    assert len(found["by_phase"]) == 7


@pytest.mark.slow
def test_four_damages(tmp_path): check_damages(campaign("damage.py", "--damages", "4", into=tmp_path / "damage.json"), FILES, set(zip(FILES[:4], WAYS + WAYS)))
