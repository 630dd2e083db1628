"""Training inside a token map is training a draft that is served with it."""

import pickle
import shlex
import subprocess
import sys

import pytest
import torch
from helpers.models import random_mimo

from swift_fastmtp.errors import FastMTPError
from swift_fastmtp.method.config import LOSSES, FastMTPConfig
from swift_fastmtp.method.token_map import DraftVocabulary, read_token_map


@pytest.fixture
def token_map(tmp_path):
    path = tmp_path / "map.pt"
    torch.save(torch.randperm(97, generator=torch.Generator().manual_seed(3))[:40].tolist(), path)
    return path


def batch():
    ids = torch.randint(0, 97, (2, 30), generator=torch.Generator().manual_seed(5))
    return ids, ids.masked_fill(torch.arange(30) < 6, -100)


def outputs(config, training=True):
    model = random_mimo(4)
    model.train(training)
    model.fastmtp = config
    ids, labels = batch()
    return model, model(input_ids=ids, labels=labels)


def test_every_id_goes_there_and_back(token_map):
    ids = read_token_map(token_map, 97)
    vocabulary = DraftVocabulary(torch.randn(97, 8), ids)
    assert torch.equal(vocabulary.decode(vocabulary.encode(ids)), ids)
    outside = torch.tensor(sorted(set(range(97)) - set(ids.tolist())))
    assert bool((vocabulary.encode(outside) == -1).all())
    assert torch.equal(vocabulary.weight, DraftVocabulary(vocabulary.weight).weight)


def test_rows_outside_the_map_are_rejections_and_end_the_chain(token_map):
    """A row is trained while its own and all earlier labels lie in the map; it is counted, as not accepted, anyway."""
    inside = set(read_token_map(token_map, 97).tolist())
    _, out = outputs(FastMTPConfig(token_map=str(token_map)))
    ids, _ = batch()
    seen = {True: 0, False: 0}
    for b in range(2):
        for i in range(30):
            alive = True
            for k in range(1, 4):
                if not bool(out.valid[k - 1, b, i]):
                    continue
                alive &= int(ids[b, i + k + 1]) in inside
                assert bool(out.trained[k - 1, b, i]) == alive
                seen[alive] += 1
                if not alive:
                    assert float(out.step_loss[k - 1, b, i].detach()) == 0 and not bool(out.match[k - 1, b, i])
    assert min(seen.values()) > 20


@pytest.mark.parametrize("loss", LOSSES)
def test_loss_is_that_of_a_model_whose_other_logits_are_minus_infinity(token_map, loss):
    """The map's losses and gradients equal the full vocabulary's with every row outside it pushed far down."""
    model, out = outputs(FastMTPConfig(token_map=str(token_map), loss=loss))
    out.loss.backward()
    want = {n: p.grad.clone() for n, p in model.head_parameters().items()}

    full = random_mimo(4)
    full.train()
    full.fastmtp = FastMTPConfig(loss=loss)
    ids = read_token_map(token_map, 97)
    # One more hidden direction, always 1, that only the rows outside the map look at: they get -1e4.
    outside = torch.ones(97, dtype=torch.bool).index_fill(0, ids, False)
    weight = torch.cat([full.lm_head.weight, -1e4 * outside[:, None]], 1).detach()
    import swift_fastmtp.model.modeling as modeling

    original = modeling.step_losses

    def padded(outputs_KND, _, targets, valid, config, hidden, rows):
        one = torch.nn.functional.pad
        kept = valid & (~outside[targets] | ~valid).cumprod(0).bool()
        return original(
            one(outputs_KND, (0, 1), value=1), weight, targets, kept, config, one(hidden, (0, 1), value=1), rows
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modeling, "step_losses", padded)
        tokens, labels = batch()
        result = full(input_ids=tokens, labels=labels)
    result.loss.backward()
    torch.testing.assert_close(out.loss, result.loss, atol=1e-5, rtol=1e-5)
    for name, parameter in full.head_parameters().items():
        torch.testing.assert_close(want[name], parameter.grad, atol=1e-5, rtol=1e-4)


def test_evaluation_shows_map_and_full_vocabulary_side_by_side(token_map):
    _, inside = outputs(FastMTPConfig(token_map=str(token_map)), training=False)
    _, full = outputs(FastMTPConfig(), training=False)
    assert torch.equal(inside.full_match, full.match)
    assert full.full_match is None and outputs(FastMTPConfig(token_map=str(token_map)))[1].full_match is None
    # A draft that the full vocabulary gets right and the map holds, the map gets right as well.
    tokens = read_token_map(token_map, 97)
    ids, _ = batch()
    for k in range(3):
        target = torch.roll(ids, -(k + 2), 1)
        held = (target[..., None] == tokens).any(-1)
        assert not (inside.full_match[k] & held & ~inside.match[k] & inside.trained[k]).any()


@pytest.mark.parametrize(
    ("content", "says"),
    [([0, 1, 97], "holds id 97, the model has rows 0..96"), ([1, 1], "holds an id twice"), ([], "flat list"),
     ([[1, 2]], "flat list"), ([0.5], "flat list"), ({"a": 1}, "not a token map")],
)  # fmt: skip
def test_maps_that_do_not_fit_are_refused(tmp_path, content, says):
    torch.save(content, tmp_path / "map.pt")
    with pytest.raises(FastMTPError, match=says):
        read_token_map(tmp_path / "map.pt", 97)


class Code:
    """What a pickle can do when it is loaded."""

    def __reduce__(self):
        return print, ("this ran",)


def test_a_pickle_with_code_is_not_loaded_and_nobody_is_told_to_load_it(tmp_path, capsys):
    torch.save([1, Code()], tmp_path / "map.pt")
    with pytest.raises(FastMTPError) as error:
        read_token_map(tmp_path / "map.pt", 97)
    assert "map.pt: holds more than tensors and lists, which could be code; it was not loaded" in str(error.value)
    assert "`fastmtp vocab` makes maps" in str(error.value)
    assert not any(word in str(error.value) for word in ("weights_only", "safe_globals", "trust"))
    assert "this ran" not in capsys.readouterr().out


def test_a_json_list_is_told_apart(tmp_path):
    """`fastmtp vocab` writes one beside each map; SGLang reads the other file."""
    path = tmp_path / "zh-4.json"
    path.write_text("[1, 2, 3, 4]\n")
    with pytest.raises(FastMTPError) as error:
        read_token_map(path, 97)
    command = str(error.value).partition("convert it in its folder: ")[2]
    assert command.startswith("python -c ")
    # The command that is given makes the file that is then named.
    subprocess.run(shlex.split(command.replace("python", sys.executable, 1)), cwd=tmp_path, check=True)
    assert read_token_map(tmp_path / "zh-4.pt", 97).tolist() == [1, 2, 3, 4]
    with pytest.raises(FastMTPError, match=r"pass .*zh-4\.pt, which holds the same ids"):
        read_token_map(path, 97)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"1 2 3\n", "no torch file"),
        (b"", "no torch file"),
        (b"PK\x03\x04", "not a token map"),
        (pickle.dumps([1, 2]), "as torch wrote before 1.6"),
    ],
)
def test_other_files_are_no_maps(tmp_path, content, says):
    (tmp_path / "map.pt").write_bytes(content)
    with pytest.raises(FastMTPError, match=says):
        read_token_map(tmp_path / "map.pt", 97)


def test_ids_of_every_whole_type_and_no_other(tmp_path):
    path = tmp_path / "map.pt"
    for dtype in (torch.int64, torch.int32, torch.uint8):
        torch.save(torch.tensor([5, 3], dtype=dtype), path)
        assert read_token_map(path, 97).tolist() == [5, 3]
    for stored in (torch.tensor([True, False]), torch.tensor([1j]), [True], [2**70], torch.eye(3).to_sparse()):
        torch.save(stored, path)
        with pytest.raises(FastMTPError, match="not a token map"):
            read_token_map(path, 97)
    torch.save([3, -1], path)
    with pytest.raises(FastMTPError, match="holds id -1"):
        read_token_map(path, 97)
