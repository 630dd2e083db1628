"""Results of a benchmark made by hand: τ and token/s of the paper's Tables 1 and 2; all else invented to fit them."""

TASKS = {
    "mt_bench": ("MT.", "en"),
    "livecodebench": ("Code", "en"),
    "math_500": ("Math", "en"),
    "rag": ("RAG", "en"),
    "qa": ("QA", "en"),
    "summarization": ("Summ.", "en"),
    "c_eval": ("ZH.", "zh"),
}
BASELINE = (31.28, 31.49, 31.90, 31.27, 31.92, 31.42, 31.63)
METHODS = {
    "vanilla": ("Vanilla MTP", "vanilla"),
    "fixed": ("Fixed-data FT", "tuned"),
    "self": ("Self-data FT", "tuned"),
    "fr": ("Self-data FT + FR", "tuned+map"),
}
# Server: per task τ and token/s, in the order of TASKS.
TABLE_1 = {
    "vanilla-k1": "1.72 41.86 1.73 42.71 1.83 44.41 1.65 40.22 1.67 41.06 1.64 39.78 1.67 41.66",
    "fixed-k1": "1.75 43.46 1.80 44.67 1.86 45.06 1.78 43.17 1.71 41.85 1.72 42.40 1.74 42.70",
    "self-k1": "1.80 44.51 1.84 45.39 1.90 46.43 1.82 43.99 1.74 42.67 1.77 42.97 1.76 44.30",
    "fr-k1": "1.78 45.79 1.82 47.59 1.88 47.58 1.80 45.66 1.74 44.60 1.74 45.45 1.76 46.38",
    "vanilla-k2": "1.85 42.03 1.82 41.70 2.00 45.52 1.71 38.35 1.82 41.26 1.73 39.00 1.78 41.27",
    "fixed-k2": "2.20 49.83 2.33 53.34 2.52 56.51 2.31 51.65 2.10 47.47 2.14 47.29 2.19 49.85",
    "self-k2": "2.35 53.90 2.45 55.67 2.62 59.68 2.40 53.96 2.23 50.71 2.26 50.93 2.27 52.66",
    "fr-k2": "2.30 58.12 2.40 60.44 2.59 63.71 2.37 58.63 2.21 55.47 2.19 55.02 2.24 58.20",
    "vanilla-k3": "1.86 38.97 1.83 38.17 2.02 42.06 1.72 35.27 1.83 38.10 1.75 36.17 1.78 37.58",
    "fixed-k3": "2.48 51.53 2.64 55.40 2.93 59.72 2.62 53.97 2.30 48.08 2.35 48.38 2.45 51.69",
    "self-k3": "2.69 56.33 2.85 59.49 3.16 65.94 2.80 57.55 2.49 52.31 2.55 53.08 2.55 54.36",
    "fr-k3": "2.62 63.42 2.75 66.24 3.07 73.66 2.75 64.55 2.46 58.88 2.47 59.15 2.53 62.93",
}  # fmt: skip
# The paper's `Mean` column: τ, token/s, speedup.
MEANS = {
    "vanilla-k1": "1.70 41.67 1.32×",
    "fixed-k1": "1.76 43.33 1.37×",
    "fr-k1": "1.79 46.15 1.46×",
    "vanilla-k2": "1.81 41.30 1.31×",
    "self-k2": "2.37 53.93 1.71×",
    "vanilla-k3": "1.83 38.04 1.21×",
    "self-k3": "2.73 57.01 1.81×",
    "fr-k3": "2.66 64.12 2.03×",
}
# Task: its baseline, then per size (None: whole vocabulary) (τ, token/s, speedup as printed).
TABLE_2 = {
    "c_eval": (31.627, {None: (2.551, 54.364, "1.719×"), 8192: (2.448, 62.015, "1.961×"),
                        16384: (2.525, 62.928, "1.990×"), 32768: (2.549, 62.210, "1.967×")}),
    "mt_bench": (31.276, {None: (2.690, 56.333, "1.801×"), 8192: (2.426, 60.260, "1.927×"),
                          16384: (2.519, 62.144, "1.987×"), 65536: (2.677, 61.572, "1.969×")}),
}  # fmt: skip


def shape(tau, num_steps):
    """Marginal and conditional rates, and a histogram of about 1000 steps, whose τ is `tau`; rates fall as a power."""
    low, high = 0.0, 1.0
    for _ in range(60):
        r = (low + high) / 2
        low, high = (r, high) if 1 + sum(r**k for k in range(1, num_steps + 1)) < tau else (low, r)
    marginal = [r**k for k in range(1, num_steps + 1)]
    ends = [1.0, *marginal, 0.0]
    histogram = [round(1000 * (ends[k] - ends[k + 1])) for k in range(num_steps + 1)]
    return marginal, [r] * num_steps, histogram


def run(server, task, tau, speed, base, num_steps, temperature=0.0, concurrency=1):
    marginal, conditional, histogram = shape(tau, num_steps) if num_steps else ([], [], [])
    value = speed / base
    return {
        "server": server,
        "task": task,
        "temperature": temperature,
        "concurrency": concurrency,
        "num_requests": 80,
        "num_failed": 0,
        "completion_tokens": 40_000,
        "tau_micro": tau if num_steps else None,
        "tau_macro": tau + 0.01 if num_steps else None,
        "marginal": marginal,
        "conditional": conditional,
        "histogram": histogram,
        "tau_by_position": [
            {"start": 256 * i, "end": 256 * (i + 1), "tau": tau - 0.03 * i, "steps": 400 - 90 * i} for i in range(4)
        ]
        if num_steps
        else [],
        "tau_by_context": [
            {"start": 128 << i, "end": 256 << i, "tau": tau - 0.05 * i, "steps": 300 - 70 * i} for i in range(4)
        ]
        if num_steps
        else [],
        "tokens_per_second": 0.96 * speed * concurrency,
        "tokens_per_second_per_request": speed,
        "ttft": {"p50": 0.041, "p90": 0.052, "p99": 0.0805},
        "itl": {"p50": 1 / speed, "p90": 1.2 / speed, "p99": 2 / speed},
        "speedup": {"value": value, "low": value - 0.04, "high": value + 0.05} if num_steps else None,
        "lossless": {"compared": 80, "equal": 80, "first_divergence": None} if num_steps and temperature == 0 else None,
    }


def server(label, method, num_steps, token_map=None, size=None):
    return {
        "label": label,
        "method": method,
        "num_steps": num_steps,
        "token_map": token_map,
        "token_map_size": size,
        "model": "MiMo-7B-RL" if method in ("baseline", "vanilla") else f"MiMo-7B-{label.split()[0]}",
        "draft_model": None,
        "command": ["python", "-m", "sglang.launch_server", "--model-path", "MiMo-7B-RL"],
    }


def results(servers, runs, tasks=TASKS):
    return {
        "schema": "swift_fastmtp.bench/1",
        "provenance": {
            "swift_fastmtp": "0.1.0",
            "torch": "2.9.1",
            "transformers": "4.57.1",
            "python": "3.12.3",
            "command": ["fastmtp", "bench", "plan.yaml", "--output_dir", "bench out"],
            "git_revision": None,
            "hardware": "made by hand",
            "started": "2025-09-22T00:00:00Z",
            "seconds": 1.0,
            "engine": {"name": "sglang", "version": "0.5.23"},
        },
        "settings": {
            "max_new_tokens": 1024,
            "seed": 0,
            "warmup": 1,
            "tasks": {
                name: {"title": tasks[name][0], "language": tasks[name][1], "source": "made up", "licence": "MIT",
                       "num_rows": 80, "sha256": "0123456789abcdef" * 4}
                for name in tasks
            },
        },
        "servers": servers,
        "baseline": "baseline",
        "runs": runs,
    }  # fmt: skip


def table_1(levels=(1,)):
    """The paper's Table 1; with more `levels`, the same at other concurrencies with shrinking gains."""
    servers, runs = {"baseline": server("Baseline", "baseline", 0)}, []
    for level in levels:
        for task, speed in zip(TASKS, BASELINE, strict=True):
            runs.append(run("baseline", task, 1.0, speed / level**0.2, speed, 0, concurrency=level))
        for name, numbers in TABLE_1.items():
            (label, method), num_steps = METHODS[name.split("-")[0]], int(name[-1])
            mapped = method.endswith("+map")
            servers[name] = server(label, method, num_steps, "by-language" if mapped else None)
            if mapped:
                servers[name]["model"] = "MiMo-7B-Self-data"
            values = list(map(float, numbers.split()))
            for task, base, tau, speed in zip(TASKS, BASELINE, values[::2], values[1::2], strict=True):
                base_here = base / level**0.2
                here = base_here * (1 + (speed / base - 1) / level**0.35)
                runs.append(run(name, task, tau, here, base_here, num_steps, concurrency=level))
    return results(servers, runs)


def table_2():
    """The paper's Table 2, K=3."""
    servers = {"baseline": server("Baseline", "baseline", 0), "tuned-k3": server("FastMTP", "tuned", 3)}
    runs = []
    for task, (base, rows) in TABLE_2.items():
        runs.append(run("baseline", task, 1.0, base, base, 0))
        language = TASKS[task][1]
        for size, (tau, speed, _) in rows.items():
            name = "tuned-k3" if size is None else f"tuned-k3-{language}-{size}"
            if size is not None:
                servers[name] = server("FastMTP + FR", "tuned+map", 3, f"{language}-{size}", size)
                servers[name]["model"] = servers["tuned-k3"]["model"]
            runs.append(run(name, task, tau, speed, base, 3))
    return results(servers, runs, {task: TASKS[task] for task in TABLE_2})
