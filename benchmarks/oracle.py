"""GPA as the paper writes it, in float64 NumPy: the judge of the library.

It keeps x, y and z apart, forms each from its own equation, and shares no code with the library.
Parameters are flat dicts of arrays; a base optimizer is a function that steps one array:
``step(memory, t, gradient, params, learning_rate) -> update``, with a dict of its own for memory.
"""

import numpy as np


def sgd(memory, t, g, p, lr):
    return -lr * g


def momentum(memory, t, g, p, lr, beta=0.9):
    memory["trace"] = g + beta * memory.get("trace", 0.0)
    return -lr * memory["trace"]


def adamw(memory, t, g, p, lr, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.1):
    memory["m"] = b1 * memory.get("m", 0.0) + (1 - b1) * g
    memory["v"] = b2 * memory.get("v", 0.0) + (1 - b2) * np.abs(g) ** 2
    m_hat = memory["m"] / (1 - b1 ** (t + 1))
    v_hat = memory["v"] / (1 - b2 ** (t + 1))
    return -lr * (m_hat / (np.sqrt(v_hat) + eps) + weight_decay * p)


def lion(memory, t, g, p, lr, b1=0.9, b2=0.99, weight_decay=0.1):
    m = memory.get("m", 0.0)
    memory["m"] = b2 * m + (1 - b2) * g
    return -lr * (np.sign(b1 * m + (1 - b1) * g) + weight_decay * p)


BASES = {"sgd": sgd, "momentum": momentum, "adamw": adamw, "lion": lion}


class Oracle:
    """x, y and z of GPA around a base optimizer."""

    def __init__(self, params, base, base_params="z", **base_arguments):
        def wide(p):
            return np.array(p, np.result_type(np.asarray(p).dtype, np.float64))

        self.x = {name: wide(p) for name, p in params.items()}
        self.y = {name: wide(p) for name, p in params.items()}
        self.z = {name: wide(p) for name, p in params.items()}
        self.memory = {name: {} for name in params}
        self.base, self.base_params, self.base_arguments = base, base_params, base_arguments
        self.t = 0

    def step(self, gradients, lr, mu_x, mu_y):
        """One step from gradients at y; lr, mu_x and mu_y are this step's numbers."""
        for name, g in gradients.items():
            g = np.asarray(g).astype(self.x[name].dtype)
            seen = self.z[name] if self.base_params == "z" else self.y[name]
            update = self.base(self.memory[name], self.t, g, seen, lr, **self.base_arguments)
            self.z[name] = self.z[name] + update
            self.x[name] = mu_x * self.x[name] + (1 - mu_x) * self.z[name]
            self.y[name] = mu_y * self.x[name] + (1 - mu_y) * self.z[name]
        self.t += 1


def two_loop_diloco(params, gradient, base, lr, sync_period, outer_lr, outer_momentum, rounds):
    """DiLoCo with one worker, as the two loops of its paper; yields (slow, fast) per step."""
    slow = {name: np.array(p, np.float64) for name, p in params.items()}
    velocity = {name: np.zeros_like(p) for name, p in slow.items()}
    memory = {name: {} for name in params}
    t = 0
    for _ in range(rounds):
        fast = {name: p.copy() for name, p in slow.items()}
        for inner in range(sync_period):
            g = gradient(t, fast)
            for name in fast:
                fast[name] = fast[name] + base(memory[name], t, g[name], fast[name], lr)
            t += 1
            if inner < sync_period - 1:
                yield slow, fast
        for name in slow:
            delta = slow[name] - fast[name]
            velocity[name] = outer_momentum * velocity[name] + delta
            slow[name] = slow[name] - outer_lr * (delta + outer_momentum * velocity[name])
        yield slow, {name: p.copy() for name, p in slow.items()}
