"""What a training step of a Llama costs, with AdamW and with GPA around it."""

import concurrent.futures
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from benchmarks.accelerator import timing
from benchmarks.accelerator.plan import Conditions, Peaks, Work, backward
from benchmarks.accelerator.results import Bar
from benchmarks.updates import DECAY, RATE, entries, shapes
from examples.llama.model import PRESETS, Llama, training_flops
from gpa_optax import gpa

SHARE = 50  # of the time of all parts
MEMORY = 0.9  # of the GPU's, for JAX
ADAMW = optax.adamw(RATE, weight_decay=DECAY)
OPTIMIZERS = {
    name: optax.chain(optax.clip_by_global_norm(1.0), optimizer)
    for name, optimizer in (("AdamW", ADAMW), ("GPA-AdamW", gpa(ADAMW)))
}
BACKWARD = "forward and backward"
LENGTH = {False: 1024, True: 64}


def measurements(quick: bool) -> list[str]:
    """Preset and sequences in a batch."""
    return ["tiny, 4 sequences"] if quick else ["160m, 16 sequences"]


def expected(measurement: str, peaks: Peaks | None) -> dict[str, dict[str, Any]]:
    """The work on paper, from `work`."""
    found = work(*parsed(measurement))
    return {
        name: {"bytes": one.bytes, "operations": one.operations, "seconds": one.seconds(peaks)}
        for name, one in found.items()
    }


def parsed(measurement: str) -> tuple[str, int]:
    preset, _, rest = measurement.partition(", ")
    return preset, int(rest.split()[0])


def work(preset: str, sequences: int) -> dict[str, Work]:
    """The work of a step with each optimizer, and of its forward and backward pass alone."""
    params = entries(shapes(preset))
    passes = backward(PRESETS[preset], sequences, LENGTH[preset == "tiny"], params)
    # Clipping reads the gradients once more.
    optimizers = {"AdamW": 4 * (7 + 1), "GPA-AdamW": 4 * (9 + 1)}
    return {
        BACKWARD: passes,
        **{name: passes.more(params * n) for name, n in optimizers.items()},
    }


def programs(measurement: str) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """The jitted functions of a measurement, and the shapes of their arguments."""
    preset, sequences = parsed(measurement)
    config = PRESETS[preset]
    length = LENGTH[preset == "tiny"]
    graph, params = nnx.split(nnx.eval_shape(lambda: Llama(config, nnx.Rngs(0))))
    tokens = jax.ShapeDtypeStruct((sequences, length + 1), jnp.int32)

    def loss(params: Any, tokens: jax.Array) -> jax.Array:
        logits = nnx.merge(graph, params)(tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    def step(optimizer: Any, params: Any, opt_state: Any, tokens: jax.Array) -> tuple[Any, Any]:
        updates, opt_state = optimizer.update(jax.grad(loss)(params, tokens), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    found = {BACKWARD: (jax.jit(jax.value_and_grad(loss)), (params, tokens))}
    for name, optimizer in OPTIMIZERS.items():
        jitted = jax.jit(functools.partial(step, optimizer), donate_argnums=(0, 1))
        found[name] = (jitted, (params, jax.eval_shape(optimizer.init, params), tokens))
    return found


def measure(measurement: str, under: Conditions) -> dict[str, Any]:
    preset, sequences = parsed(measurement)
    while True:
        fitting = f"{preset}, {sequences} sequences"
        try:
            contenders = compiled(fitting)
            peak_bytes = {name: peak_memory(contenders[name]) for name in OPTIMIZERS}
            break
        except Exception as error:
            if timing.reason(error) != timing.OUT_OF_MEMORY or sequences == 1:
                raise
            sequences //= 2
    product = timing.product_of(256 if under.quick else 8192)
    rounds, row = (3, 0.01) if under.quick else (9, 0.3)
    times, failed = timing.take_turns([product, *contenders.values()], rounds, row, under.deadline)

    length = LENGTH[under.quick]
    operations = training_flops(PRESETS[preset], sequences, length)
    products = timing.quartiles(times.pop(product.name))
    peak = 2 * product.rest[0].shape[0] ** 3 / products[1]
    paper = expected(fitting, under.peaks)
    found = {
        "sequences": sequences,
        "length": length,
        "operations": operations,
        "product": {"size": product.rest[0].shape[0], "seconds": products, "flops": peak},
        "failed_steps": failed,
        "steps": {},
    }
    for name, seconds in times.items():
        median = timing.quartiles(seconds)[1]
        found["steps"][name] = {
            "rounds": len(seconds),
            "seconds": timing.quartiles(seconds),
            "tokens_per_second": sequences * length / median,
            "share_of_product": operations / median / peak,
            "memory_by_analysis": contenders[name].memory(),
            "predicted_seconds": paper[name]["seconds"],
        }
    for name in OPTIMIZERS:
        if name in times and BACKWARD in times:
            shares = [1 - b / s for b, s in zip(times[BACKWARD], times[name], strict=False)]
            found["steps"][name] |= {
                "optimizer_share": timing.quartiles(shares),
                "peak_bytes": peak_bytes[name],
            }
    found["profiles"] = {name: one.profile() for name, one in contenders.items() if name in times}
    return found


def compiled(measurement: str) -> dict[str, timing.Repeated]:
    """The functions of a measurement on the device that is here, on random tokens."""
    preset, _ = parsed(measurement)
    config = PRESETS[preset]
    model = nnx.jit(lambda: Llama(config, nnx.Rngs(0)))
    waiting, found = {}, {}
    with concurrent.futures.ThreadPoolExecutor() as pool:
        for name, (jitted, arguments) in programs(measurement).items():
            waiting[name] = pool.submit(lambda j=jitted, a=arguments: j.lower(*a).compile())
    tokens = jax.random.randint(
        jax.random.key(0), arguments[-1].shape, 0, config.vocab_size, jnp.int32
    )

    def start(name: str) -> tuple[Any, ...]:
        params = nnx.state(model())
        return (params, OPTIMIZERS[name].init(params)) if name in OPTIMIZERS else (params,)

    for name, program in waiting.items():
        make = functools.partial(start, name)
        carried = name in OPTIMIZERS
        found[name] = timing.Repeated(name, program.result(), make, tokens, carried=carried)
    return found


def peak_memory(one: timing.Repeated) -> int | None:
    """The most that this process has held on the device so far, after some steps; None if the
    device does not report it."""
    one.prepare()
    try:
        timing.timed(one, timing.WARM_UP)
        return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    finally:
        one.release()


def bars(found: dict[str, Any]) -> list[Bar]:
    """No goals were set for this part."""
    return []


def told(result: dict[str, Any]) -> str:
    """The lines of progress of a measurement."""
    lines = [f"a product of bfloat16 matrices {result['product']['flops'] / 1e12:,.1f} TFLOP/s"]
    for name, row in result["steps"].items():
        expected = row["predicted_seconds"]
        said = "" if expected is None else f", {1e3 * expected:.1f} expected"
        lines.append(
            f"{name}: {1e3 * row['seconds'][1]:.1f} ms{said}, {row['tokens_per_second']:,.0f} "
            f"tokens/s, {row['share_of_product']:.0%} of the product"
        )
        if "optimizer_share" in row:
            lines[-1] += f", the optimizer {row['optimizer_share'][1]:.1%}"
        if row.get("peak_bytes"):
            lines[-1] += f", at most {row['peak_bytes'] / 2**30:.1f} GiB"
    return "\n".join(lines)
