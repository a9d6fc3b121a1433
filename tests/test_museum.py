"""A record may cut the museum: without section 17 the baseline trains to the same bits."""

import hashlib
import json
import re

import torch

from tests.conftest import ROOT, launch

SOURCE = (ROOT / "train_gpt.py").read_text(encoding="utf-8")
RULE = "# " + "-" * 106 + "\n"


def without_the_museum() -> str:
    """The script less section 17 and its base of Config."""
    museum = re.search(rf"{RULE}# 17\. MUSEUM.*?(?={RULE}# 18\. )", SOURCE, re.DOTALL)[0]
    assert len(museum) > 10_000
    cut = SOURCE.replace(museum, "")
    assert cut.count("MuseumKnobs") == 1
    return re.sub(r"\n *MuseumKnobs,", "", cut)


def weights_of(folder) -> str:
    state = torch.load(folder / "final_model.pt", weights_only=True)
    values = b"".join(tensor.numpy().tobytes() for _, tensor in sorted(state.items()))
    return hashlib.sha256(values).hexdigest()


def test_the_baseline_trains_to_the_same_bits_without_the_museum(tmp_path, dataset, run_main):
    code, out, err = run_main(out_dir="with_it")
    assert code == 0, err
    score = json.loads(out.splitlines()[-1].removeprefix("RESULT "))["val_bpb"]
    folder = tmp_path / "without"
    folder.mkdir()
    script = folder / "train_gpt.py"
    script.write_text(without_the_museum(), encoding="utf-8")
    outcome = launch(folder, dataset, script=script)
    assert weights_of(folder) == weights_of(tmp_path / "with_it")
    assert outcome.result["val_bpb"] == score
