"""The noise schedule and one step of every sampler, in f64 from the formulas; no PyTorch.

    python schedule_reference.py      # writes tests/golden/schedule.json

Times are steps of the schedule: 0 is the clean picture, 1000 all but noise.
"""

import json
import math
from pathlib import Path


def alpha_bar(t):
    """Cosine schedule; betas clipped at 0.999 touch only the last of the 1000 steps."""
    f = lambda u: math.cos((u / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2
    return max(f(t) / f(0), 0.001 * f(999) / f(0))


def coefficients(objective, t):
    """(a, b, c, d): noisy = a x0 + b noise, target = c x0 + d noise."""
    if objective == "flow":
        return 1 - t / 1000, t / 1000, -1.0, 1.0
    a, b = math.sqrt(alpha_bar(t)), math.sqrt(1 - alpha_bar(t))
    return a, b, *{"epsilon": (0.0, 1.0), "x0": (1.0, 0.0), "v": (-b, a)}[objective]


def ddim(x0, eps, s):
    a, b = math.sqrt(alpha_bar(s)), math.sqrt(1 - alpha_bar(s))
    return [a * x + b * e for x, e in zip(x0, eps)]


def ancestral(x0, xt, z, t, s):
    bar_t, bar_s = alpha_bar(t), alpha_bar(s)
    ratio = bar_t / bar_s
    from_x0, from_xt = math.sqrt(bar_s) * (1 - ratio) / (1 - bar_t), math.sqrt(ratio) * (1 - bar_s) / (1 - bar_t)
    sigma = math.sqrt((1 - bar_s) / (1 - bar_t) * (1 - ratio))
    return [from_x0 * x + from_xt * y + sigma * n for x, y, n in zip(x0, xt, z)]


def schedule_golden():
    times, names = [1, 10, 500, 999, 1000], ["epsilon", "x0", "v", "flow"]
    x0, eps, z = [-0.9, -0.2, 0.3, 0.75], [1.25, -0.5, 0.1, -2.0], [0.4, -1.1, 0.9, 0.0]
    v, v_next = [0.5, -0.3, 1.5, -0.1], [0.6, -0.2, 1.1, 0.2]
    steps = []
    for t, s in [(1000, 960), (500, 480), (20, 0)]:
        a, b, *_ = coefficients("epsilon", t)
        xt = [a * x + b * e for x, e in zip(x0, eps)]
        h = (s - t) / 1000
        steps.append({
            "t": t, "s": s, "x_t": xt, "ddim": ddim(x0, eps, s), "ancestral": ancestral(x0, xt, z, t, s),
            "euler": [x + h * u for x, u in zip(xt, v)], "heun": [x + h * (u + n) / 2 for x, u, n in zip(xt, v, v_next)],
        })  # fmt: skip
    return {
        "alpha_bar": {str(t): alpha_bar(t) for t in [0, *times]},
        "coefficients": {name: {str(t): coefficients(name, t) for t in times} for name in names},
        "x0": x0, "eps": eps, "z": z, "v": v, "v_next": v_next, "steps": steps,
    }  # fmt: skip


if __name__ == "__main__":
    golden = Path(__file__).parent.parent / "golden" / "schedule.json"
    golden.write_text(json.dumps(schedule_golden(), indent=1) + "\n")
