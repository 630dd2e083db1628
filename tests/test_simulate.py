"""Generation and the simulator, on the trained tiny model."""

import json
from pathlib import Path

import pytest
import torch
from helpers.checkpoints import write_trained
from helpers.paths import ROOT, TINY
from helpers.reference import speculative_greedy
from transformers import AutoTokenizer

from swift_fastmtp.data.chat_template import encode_prompt
from swift_fastmtp.data.distill import distill
from swift_fastmtp.data.generate import end_token_ids, generate
from swift_fastmtp.errors import FastMTPError
from swift_fastmtp.families.family import ENGINES
from swift_fastmtp.files.rows import read_rows
from swift_fastmtp.method.config import FastMTPConfig
from swift_fastmtp.method.map_files import read_map_list
from swift_fastmtp.method.metrics import micro_tau
from swift_fastmtp.method.rollout import segment_ids
from swift_fastmtp.method.token_map import DraftVocabulary
from swift_fastmtp.model.loading import load_model
from swift_fastmtp.simulate import acceptance
from swift_fastmtp.simulate import simulate as simulate_module
from swift_fastmtp.simulate.acceptance import Text, draft_rounds, greedy_acceptance, make_texts, sampled_acceptance
from swift_fastmtp.simulate.positions import parts_of, parts_table
from swift_fastmtp.simulate.request_map import RequestMap, mean_size
from swift_fastmtp.simulate.simulate import simulate

PROMPTS = ROOT / "examples" / "prompts" / "eval.jsonl"


@pytest.fixture(scope="module")
def tiny():
    return load_model(TINY, torch.float32), AutoTokenizer.from_pretrained(TINY)


@pytest.fixture
def few(tmp_path):
    """Six prompts: two of each kind."""
    rows = [json.loads(line) for line in PROMPTS.read_text().splitlines()]
    chosen = [r for c in ("en", "zh", "code") for r in [r for r in rows if r["category"] == c][:2]]
    path = tmp_path / "few.jsonl"
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in chosen))
    return path


@pytest.mark.parametrize("engine", ENGINES)
def test_simulated_rounds_are_those_of_real_speculative_decoding(tiny, few, engine):
    """Teacher-forced matches walked as rounds = drafting on own tokens and verifying, round by round."""
    model, tokenizer = tiny
    model.fastmtp = FastMTPConfig(num_speculative_steps=4, engine=engine)
    ends = end_token_ids(model, tokenizer)
    texts = make_texts(model, tokenizer, read_rows(few), 24, "generate", 4)
    half, few_ids = torch.arange(0, 6144, 2), torch.arange(0, 600)

    def of_request(ids):
        return torch.cat([few_ids, torch.tensor(ids)]).unique()

    accepted = []
    cases = [(None, None, (1, 4)), (half, half, (1, 4)), (RequestMap(few_ids), of_request, (4,))]
    for token_map, served, depths in cases:
        rounds = draft_rounds(model, texts, tokenizer.pad_token_id, 4, token_map)
        for i, text in enumerate(texts):
            for steps in depths:
                with torch.no_grad():
                    tokens, want = speculative_greedy(model, text.ids[: text.start], steps, 24, ends, served)
                assert tokens == text.ids[text.start : text.end]  # lossless
                assert rounds[steps - 1][i] == want
        accepted.append(sum(map(sum, rounds[-1])))
    assert accepted[0] > accepted[1] > 0  # drafts were really accepted, and the map costs some
    assert accepted[2] > 0


def test_parts_are_of_the_steps_that_begin_there(tiny, few):
    """Against the rounds, counted one by one."""
    model, tokenizer = tiny
    model.fastmtp = FastMTPConfig(num_speculative_steps=3)
    texts = make_texts(model, tokenizer, read_rows(few), 160, "generate", 4)
    (accepted,) = greedy_acceptance(model, texts, tokenizer.pad_token_id, 4)
    rounds = draft_rounds(model, texts, tokenizer.pad_token_id, 4)[-1]
    parts = parts_of(texts, accepted)
    seen = []
    for part in parts:
        inside, outside, answers = [], [], set()
        for number, (text, counts) in enumerate(zip(texts, rounds, strict=True)):
            here, elsewhere, before = [], [], 1 + (text.start if part.of == "context" else 0)
            for count in counts:
                (here if part.start <= before < part.end else elsewhere).append(count)
                before += count + 1
            if here:
                answers.add(number)
                inside += here
                outside += elsewhere
        assert (part.answers, part.steps) == (len(answers), len(inside))
        assert part.tau == 1 + sum(inside) / len(inside)
        assert part.first == sum(count > 0 for count in inside) / len(inside)
        assert part.elsewhere == (1 + sum(outside) / len(outside) if outside else None)
        seen.append((part.of, len(inside)))
    for of in ("answer", "context"):
        assert sum(steps for name, steps in seen if name == of) == sum(map(len, rounds))
        assert len([name for name, _ in seen if name == of]) > 1
    table = parts_table(parts, 3)
    assert "answer, 64 to 127" in table and "same answers elsewhere" in table


def test_batched_generation_equals_one_by_one(tiny, few):
    model, tokenizer = tiny
    prompts = [encode_prompt(tokenizer, r["messages"]) for r in read_rows(few)]
    assert generate(model, tokenizer, prompts, 16) == [generate(model, tokenizer, [p], 16)[0] for p in prompts]


def test_simulate_writes_table_json_and_plot(few, tmp_path, capsys):
    (result,) = simulate(str(TINY), [], str(few), output_dir=str(tmp_path / "out"), num_steps=3, max_new_tokens=24)
    printed = capsys.readouterr().out
    assert "tau K=3" in printed and "marginal" in printed and "conditional" in printed
    record = json.loads((tmp_path / "out" / "simulate.json").read_text())
    assert record["heads"][0]["tau_micro"] == result.tau_micro
    assert {"command", "git_revision", "torch", "hardware"} <= set(record["provenance"])
    assert (tmp_path / "out" / "simulate.png").read_bytes()[:4] == b"\x89PNG"
    assert result.tau_micro == sorted(result.tau_micro) and result.tau_micro[0] > 1.2
    rounds = [[k] * n for k, n in enumerate(result.histogram)]
    assert micro_tau(rounds) == pytest.approx(result.tau_micro[-1])


def test_above_temperature_0_every_regime_is_measured(few, tmp_path, capsys):
    out = tmp_path / "out"
    results = simulate(str(TINY), [], str(few), output_dir=str(out), max_new_tokens=24, temperature=1.0)
    greedy, rejection, block = results
    assert [r.regime for r in results] == ["greedy", "rejection", "block"]
    assert greedy.tau_micro[-1] < rejection.tau_micro[-1]
    assert block.marginal[0] == pytest.approx(rejection.marginal[0])
    assert block.marginal[-1] > rejection.marginal[-1]
    printed = capsys.readouterr().out
    assert "base + block verification" in printed
    assert "greedy drafts, target-only acceptance: SGLang: no flag; vLLM: no setting\n" in printed
    assert "below, and by `fastmtp serve-args --temperature 1`: sampled drafts, rejection sampling\n" in printed
    record = json.loads((out / "simulate.json").read_text())
    assert record["regime"] == "rejection" and [r["regime"] for r in record["heads"]] == [r.regime for r in results]


def test_given_answers_are_taken_as_they_are(few, tmp_path):
    distill(str(TINY), str(few), str(tmp_path / "d.jsonl"), max_new_tokens=24, temperature=0)
    (given,) = simulate(str(TINY), [], str(tmp_path / "d.jsonl"), answers="given")
    (generated,) = simulate(str(TINY), [], str(few), max_new_tokens=24)
    assert given.marginal == generated.marginal and given.conditional == generated.conditional
    # What would have followed a given answer is not known, so drafts past its end never count.
    assert all(a <= b for a, b in zip(given.tau_micro, generated.tau_micro, strict=True))


def counted(monkeypatch):
    """Grows by a line for each call of the model's backbone, and of `generate`."""
    calls = []
    original = simulate_module.load_model

    def load(*args, **options):
        model = original(*args, **options)
        model.model.register_forward_hook(lambda *_: calls.append("backbone"))
        return model

    monkeypatch.setattr(simulate_module, "load_model", load)
    generating = acceptance.generate
    monkeypatch.setattr(acceptance, "generate", lambda *a, **k: (calls.append("generate"), generating(*a, **k))[1])
    return calls


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_answers_of_a_file_are_not_generated_again(few, tmp_path, monkeypatch, temperature):
    """Nor is a state of the backbone computed again. With fewer drafts too; more of them, or more rows, are added."""
    calls = counted(monkeypatch)
    options = {"max_new_tokens": 8, "temperature": temperature, "batch_size": 4}
    again = {**options, "answers": str(tmp_path / "answers.jsonl"), "hidden_cache": str(tmp_path / "states")}
    plain = simulate(str(TINY), [], str(few), **options)
    assert simulate(str(TINY), [], str(few), **again) == plain
    calls.clear()
    assert simulate(str(TINY), [], str(few), **again) == plain
    assert calls == []
    shorter = simulate(str(TINY), [], str(few), num_steps=2, **again)
    assert calls == [] and shorter[0].marginal == plain[0].marginal[:2]
    with open(few, "a") as file:
        file.write(PROMPTS.read_text().splitlines()[-1] + "\n")
    calls.clear()
    simulate(str(TINY), [], str(few), **again)
    assert 0 < calls.count("generate") <= 4  # a batch, answers and what follows them


def test_answers_of_other_settings_are_refused(few, tmp_path):
    file = tmp_path / "answers.jsonl"

    def run(**options):
        simulate(str(TINY), [], str(few), max_rows=1, **{"max_new_tokens": 4, "answers": str(file), **options})

    run()
    before = file.read_bytes()
    for options, message in (
        ({"max_new_tokens": 5}, "generated with max_new_tokens 4, this run has 5; name another file"),
        ({"temperature": 0.5}, "generated with temperature 0.0, this run has 0.5"),
        ({"dtype": "bfloat16"}, "generated with dtype"),
        ({"answers": str(few)}, "not a file of answers of this version; name a new file"),
        ({"answers": "generated"}, "must be `generate`, `given`, or a file whose name ends in .jsonl"),
    ):
        with pytest.raises(FastMTPError) as error:
            run(**options)
        assert message in str(error.value) and "\n" not in str(error.value)
    assert file.read_bytes() == before
    for line in ("[]", "{}", '{"prompt": [1], "sample": 0, "answer": [9999], "after": []}', "\xff"):
        file.write_bytes(before + line.encode("latin-1") + b"\n")
        with pytest.raises(FastMTPError, match=r"answers\.jsonl:3: "):
            run()


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_generation_goes_on_after_a_kill(few, tmp_path, temperature):
    """With any number of batches on disk, and a torn line behind them: the same file at the end."""
    options = {"max_new_tokens": 8, "temperature": temperature, "batch_size": 2}
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    plain = simulate(str(TINY), [], str(few), answers=str(whole), **options)
    lines = whole.read_bytes().splitlines(keepends=True)
    assert len(lines) == 7
    for kept in (1, 4):
        cut.write_bytes(b"".join(lines[:kept]) + lines[kept][:20])
        assert simulate(str(TINY), [], str(few), answers=str(cut), **options) == plain
        assert cut.read_bytes() == whole.read_bytes()


def test_states_of_another_model_dtype_or_graph_are_refused(few, tmp_path):
    options = {"answers": str(tmp_path / "answers.jsonl"), "max_new_tokens": 4, "max_rows": 1}
    cache = str(tmp_path / "states")
    simulate(str(TINY), [], str(few), hidden_cache=cache, **options)
    for other in ({"dtype": "bfloat16"}, {"engine": "vllm"}, {"engine": "both"}):
        with pytest.raises(FastMTPError, match=r"another model .* name another folder as --hidden_cache, or delete"):
            simulate(str(TINY), [], str(few), hidden_cache=cache, **{**options, "answers": "generate", **other})


@torch.no_grad()
def states_of(model, ids, rows):
    """Backbone and draft states of one text."""
    tokens = torch.tensor(ids)[None]
    positions, mask = torch.arange(len(ids))[None], torch.ones_like(tokens)
    segments = segment_ids(positions, mask)
    hidden = model.backbone_states(tokens, mask, positions, segments)
    return hidden, model.draft_states(hidden, tokens, positions, segments, rows)


def test_maps_in_one_pass_equal_each_alone(tiny, few):
    model, tokenizer = tiny
    model.fastmtp = FastMTPConfig(num_speculative_steps=3)
    texts = make_texts(model, tokenizer, read_rows(few), 24, "generate", 4)
    maps = [None, torch.arange(0, 6144, 2), torch.arange(1, 6144, 3)]
    together = greedy_acceptance(model, texts, tokenizer.pad_token_id, 3, maps)
    for ids, found in zip(maps, together, strict=True):
        vocabulary = DraftVocabulary(model.lm_head.weight, ids)
        for text, accepted_KA in zip(texts, found, strict=True):
            _, states = states_of(model, text.ids, torch.arange(text.start - 1, text.end - 1))
            going_on = [True] * accepted_KA.shape[1]
            for k, state in enumerate(states):
                draft = vocabulary.decode((state @ vocabulary.weight.T).argmax(-1))
                for t, token in enumerate(draft.tolist()):
                    place = text.start + t + k + 1
                    going_on[t] &= place < len(text.ids) and text.ids[place] == token
                    assert bool(accepted_KA[k, t]) == going_on[t]


def test_with_its_own_ids_a_request_drafts_at_each_position_as_inside_a_map_of_them(tiny, few):
    """Greedy and sampled drafts; and how many ids there are."""
    model, tokenizer = tiny
    model.fastmtp = FastMTPConfig(num_speculative_steps=2)
    base = torch.arange(300, 900)
    texts = make_texts(model, tokenizer, read_rows(few)[3:5], 12, "generate", 4, temperature=1.0)
    maps, sizes = [RequestMap(base)], []
    for text in texts:
        for last in range(text.start, text.end - 1):
            maps.append(torch.cat([base, torch.tensor(text.ids[: last + 1])]).unique())
            sizes.append(len(maps[-1]))
    greedy = greedy_acceptance(model, texts, tokenizer.pad_token_id, 4, maps)
    sampled = sampled_acceptance(model, texts, tokenizer.pad_token_id, 4, 1.0, maps)
    for found in (greedy, sampled):
        inside = iter(found[1:])
        for number, text in enumerate(texts):
            for t in range(text.end - text.start - 1):
                torch.testing.assert_close(found[0][number][:, t], next(inside)[number][:, t], atol=1e-6, rtol=1e-5)
    assert mean_size(texts, base) == pytest.approx(sum(sizes) / len(sizes))
    assert sampled[0][0].any() and greedy[0][0].any()


def test_ids_of_requests_are_measured_and_not_recommended(few, tmp_path, capsys):
    path = tmp_path / "en-900.pt"
    torch.save(list(range(900)), path)
    options = {"max_new_tokens": 24, "token_maps": [str(path)], "by": "language"}
    results = simulate(str(TINY), [], str(few), output_dir=str(tmp_path / "out"), context_maps=[str(path)], **options)
    printed = capsys.readouterr().out
    by_form = {r.by_request: r for r in results if r.group == "all" and r.token_map}
    assert by_form[True].tau_micro[0] > by_form[False].tau_micro[0]
    assert by_form[True].num_ids > by_form[False].num_ids == 900
    assert f"en-900.pt + the request's ids: all: {by_form[True].num_ids} ids on average, tau K=3" in printed
    plain = simulate(str(TINY), [], str(few), output_dir=str(tmp_path / "plain"), **options)
    assert [r for r in results if not r.by_request] == plain
    records = [json.loads((tmp_path / name / "simulate.json").read_text()) for name in ("out", "plain")]
    assert records[0]["recommended"] == records[1]["recommended"]


@pytest.mark.matrix
def test_sampled_drafts_are_accepted_with_the_probability_of_speculative_sampling(tiny, few):
    """The mean of min(1, q/p) over tokens drawn from p is sum min(p, q), inside a map as well."""
    model, tokenizer = tiny
    model.fastmtp = FastMTPConfig(num_speculative_steps=1)
    prompts = [encode_prompt(tokenizer, r["messages"]) for r in read_rows(few)]
    torch.manual_seed(0)
    texts, exact = [], []
    keep = torch.arange(0, 6144, 2)
    for prompt in prompts[:2]:
        (first,) = generate(model, tokenizer, [prompt], 1, 1.0, stop=False)
        hidden, (state,) = states_of(model, prompt + first.token_ids, torch.tensor([len(prompt) - 1]))
        p, logits = (hidden[0, -1] @ model.lm_head.weight.T).softmax(-1), state[0] @ model.lm_head.weight.T
        q = torch.zeros_like(p)
        q[keep] = logits[keep].softmax(-1)
        exact.append([float(torch.minimum(p, logits.softmax(-1)).sum()), float(torch.minimum(p, q).sum())])
        draws = torch.multinomial(p, 4000, replacement=True).tolist()
        texts.append([Text([*prompt, *first.token_ids, x], len(prompt), len(prompt) + 2) for x in draws])
    for drawn, want in zip(texts, exact, strict=True):
        found = sampled_acceptance(model, drawn, tokenizer.pad_token_id, 500, 1.0, [None, keep])
        for of_map, expected in zip(found, want, strict=True):
            mean = float(torch.stack([a[0, 0] for a in of_map]).mean())
            assert mean == pytest.approx(expected, abs=0.03)


def test_tables_and_maps_by_language(few, tmp_path, capsys):
    for name, ids in {"zh-3072": range(1, 6144, 2), "en-512": range(0, 512)}.items():
        torch.save(list(ids), tmp_path / f"{name}.pt")
    maps = [str(tmp_path / "zh-3072.pt"), str(tmp_path / "en-512.pt")]
    out = tmp_path / "out"
    results = simulate(str(TINY), [], str(few), output_dir=str(out), max_new_tokens=24, token_maps=maps, by="language")
    printed = capsys.readouterr().out
    record = json.loads((out / "simulate.json").read_text())
    assert {"code", "en", "zh"} <= set(record["groups"])
    alone = simulate(str(TINY), [], str(few), max_new_tokens=24, token_maps=maps[:1])
    (again,) = [r for r in results if r.group == "all" and r.token_map == maps[0]]
    assert again == alone[1]
    best = record["recommended"]["token_maps"]
    chosen = {g: m for g, m in best.items() if m and g != "unknown"}
    listed = read_map_list(out / "maps.json")
    assert list(listed) == list(chosen)
    for group, path in listed.items():
        assert path.parent == out / "token_maps" and path.read_bytes() == Path(chosen[group]).read_bytes()
    assert "recommended: K=" in printed or "recommended: no drafts" in printed
    assert (out / "maps.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("pad", [None, "<|pad|>"], ids=["none", "beyond the embedding"])
def test_a_tokenizer_without_a_pad_token_that_the_model_has(pad, tiny, few, tmp_path):
    """Padding is masked, so answers and acceptance are the same without one: `generate`, `distill` and `simulate`."""
    model, tokenizer = tiny
    folder = tmp_path / "model"
    folder.mkdir()
    for file in TINY.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["pad_token"]
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    without = AutoTokenizer.from_pretrained(folder)
    if pad:
        without.add_tokens([f"<|filler {i}|>" for i in range(model.config.vocab_size - len(without))])
        without.add_special_tokens({"pad_token": pad})
        without.save_pretrained(folder)
    assert (without.pad_token_id is None) if pad is None else (without.pad_token_id >= model.config.vocab_size)
    prompts = [encode_prompt(tokenizer, r["messages"]) for r in read_rows(few)]
    assert generate(model, without, prompts, 16) == generate(model, tokenizer, prompts, 16)
    asked = {"max_new_tokens": 12, "temperature": 0.0}
    found = []
    for name in (TINY, folder):
        output = tmp_path / f"{name.name}.jsonl"
        distill(str(name), str(few), str(output), **asked)
        (result,) = simulate(str(name), [], str(few), num_steps=2, **{**asked, "batch_size": 4})
        found.append((output.read_bytes(), result.tau_micro, result.marginal))
    assert found[0] == found[1]


def test_the_backbone_runs_once_for_all_heads(few, tmp_path, monkeypatch):
    """And what it computed is what every head gets, bit for bit."""
    calls = []

    def counted(*args, **kwargs):
        model = load_model(*args, **kwargs)
        model.model.register_forward_hook(lambda *_: calls.append(1))
        return model

    monkeypatch.setattr("swift_fastmtp.simulate.simulate.load_model", counted)
    distilled = tmp_path / "answers.jsonl"
    distill(str(TINY), str(few), str(distilled), max_new_tokens=24)
    heads = [str(write_trained(tmp_path / str(added), added=added)) for added in (0.001, 0.002)]
    options = {"answers": "given", "num_steps": 2, "temperature": 1.0, "batch_size": 2}
    together = simulate(str(TINY), heads, str(distilled), **options)
    assert len(calls) == 3  # batches
    alone = [simulate(str(TINY), [head], str(distilled), **options)[3:] for head in heads]
    assert together[3:6] == alone[0] and together[6:] == alone[1]  # in three regimes each
