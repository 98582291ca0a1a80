"""FLOPs of single HLO operations, derived by hand: products, convolutions that are products, attention kernels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpar import _hlo
from jaxpar._hlo._flops import flops_of, work_of


def program(entry, *others):
    body = "\n".join(f"  {line}" for line in entry)
    return _hlo.read(
        "HloModule m, is_scheduled=true\n\n" + "".join(others) + f"ENTRY %main () -> f32[] {{\n{body}\n}}\n"
    ).program


def work(lines, name, *others):
    found = program(lines, *others)
    return work_of(found, found.computations["main"].ops[name])


def total(function, *args):
    """FLOPs of a compiled function, its loops' bodies once."""
    module = _hlo.read(jax.jit(function).lower(*args).compile().as_text())
    entry = module.program.computations[module.program.entry]
    return sum(flops_of(module.program, op) for op in entry.ops.values())


def ones(*shape):
    return jax.ShapeDtypeStruct(shape, np.float32)


def test_matrix_products():
    assert total(jnp.dot, ones(3, 5), ones(5, 7)) == 2 * 3 * 5 * 7
    assert total(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), ones(4, 3, 5), ones(4, 5, 7)) == 2 * 4 * 3 * 5 * 7
    assert total(lambda a, b: jnp.einsum("ij,ij->", a, b), ones(3, 5), ones(3, 5)) in (0, 2 * 15)  # may be a reduction


def test_elementwise_work_is_none():
    assert total(lambda x: jnp.tanh(x) * 2 + x.sum(), ones(64, 64)) == 0


def test_what_is_called_counts_once():
    def two(x, w):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0]

    assert total(two, ones(8, 16), ones(5, 16, 16)) == 2 * 8 * 16 * 16  # whoever walks the loop multiplies


def test_the_longest_branch_counts():
    def branch(p, x, w):
        return jax.lax.cond(p, lambda: x @ w @ w, lambda: x @ w)

    assert total(branch, jax.ShapeDtypeStruct((), np.bool_), ones(8, 16), ones(16, 16)) == 2 * (2 * 8 * 16 * 16)


@pytest.mark.parametrize(
    ("settings", "taps"),
    [
        ({}, (8 + 7 + 7) ** 2),  # 3 taps "same" over 8 places: 7, 8 and 7 meet the input
        ({"padding": "VALID"}, (6 * 3) ** 2),
        ({"window_strides": (2, 2), "padding": "VALID"}, (3 * 3) ** 2),
        ({"rhs_dilation": (2, 2), "padding": "VALID"}, (4 * 3) ** 2),
        # 15 places, every second an element: each of the 3 taps at 13 places meets 7, 6 and 7 of them
        ({"lhs_dilation": (2, 2), "padding": ((0, 0), (0, 0))}, (7 + 6 + 7) ** 2),
    ],
    ids=str,
)
def test_convolutions_leave_padding_out(settings, taps):
    settings = {"window_strides": (1, 1), "padding": "SAME", **settings}

    def convolve(x, w):
        return jax.lax.conv_general_dilated(x, w, dimension_numbers=("NHWC", "HWIO", "NHWC"), **settings)

    text = jax.jit(convolve).lower(ones(2, 8, 8, 4), ones(3, 3, 4, 5)).compile().as_text()
    module = _hlo.read(text)
    found = [
        w for c in module.program.computations.values() for op in c.ops.values() if (w := work_of(module.program, op))
    ]
    assert [(each.kind, each.flops) for each in found] == [("convolution", 2.0 * 2 * 4 * 5 * taps)]


def test_a_product_that_a_tpu_writes_as_a_convolution():
    """64 heads are 64 places of a window that lies mostly on padding: one tap each."""
    lines = [
        "%a = bf16[6,2048,4096,1]{2,1,0,3} parameter(0)",
        "%b = bf16[1,4096,64,128]{3,2,1,0} parameter(1)",
        (
            "%c = bf16[6,2048,64,128]{3,1,2,0:T(8,128)(2,1)} convolution(%a, %b), window={size=1x64 pad=0_0x63_63 "
            'rhs_reversal=0x1}, dim_labels=0bf1_0i1o->0b1f, metadata={op_name="jit(f)/dot_general"}'
        ),
    ]
    found = work(lines, "c")
    assert found is not None
    assert (found.kind, found.flops, found.dtype) == ("matmul", 2.0 * 6 * 2048 * 4096 * 64 * 128, "bf16")


def test_gemms_and_convolutions_of_cuda_libraries():
    lines = [
        "%x = bf16[32,64]{1,0} parameter(0)",
        "%w = bf16[64,128]{1,0} parameter(1)",
        (
            '%g = (bf16[32,128]{1,0}, s8[1024]{0}) custom-call(%x, %w), custom_call_target="__cublas$gemm", '
            'backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],'
            '"rhs_contracting_dimensions":["0"]}}}'
        ),
        "%i = f16[2,8,8,4]{3,2,1,0} parameter(2)",
        "%k = f16[3,3,4,5]{3,2,1,0} parameter(3)",
        "%o = f16[2,6,6,5]{3,2,1,0} parameter(4)",
        (
            "%dk = (f16[3,3,4,5]{3,2,1,0}, u8[0]{0}) custom-call(%i, %o), window={size=3x3}, "
            'dim_labels=b01f_01io->b01f, custom_call_target="__cudnn$convBackwardFilter"'
        ),
    ]
    gemm, filters = work(lines, "g"), work(lines, "dk")
    assert gemm is not None
    assert filters is not None
    assert gemm.flops == 2.0 * 32 * 64 * 128
    assert filters.flops == 2.0 * 2 * 4 * 5 * (6 * 3) ** 2


def test_cudnn_attention():
    lines = [
        "%q = bf16[4,512,8,64]{3,2,1,0} parameter(0)",
        (
            "%a = (bf16[4,8,512,64]{3,1,2,0}, u8[0]{0}) custom-call(%q, %q, %q), "
            'custom_call_target="__cudnn$fmhaSoftmax", '
            'backend_config={"cudnn_fmha_backend_config":{"intermediate_tensor_shape":{"element_type":"BF16",'
            '"dimensions":["4","8","512","512"],"tuple_shapes":[]},"mask_type":"CAUSAL"}}'
        ),
    ]
    found = work(lines, "a")
    assert found is not None
    one = 2.0 * 4 * 8 * 512 * 512 * 64
    assert (found.full, found.causal, found.flops) == (2 * one, one, one)


@pytest.mark.parametrize(
    ("name", "results", "run", "needed"),
    [
        ("splash_mha_fwd_residuals.1", "(bf16[2,4,1024,128]{3,2,1,0}, f32[2,4,1024,128]{3,2,1,0})", 2, 2),
        ("splash_mha_dkv_no_residuals.1", "(bf16[2,4,1024,128]{3,2,1,0}, bf16[2,4,1024,128]{3,2,1,0})", 4, 3),
        ("splash_mha_dq_no_residuals", "bf16[2,4,1024,128]{3,2,1,0}", 3, 1),
    ],
)
def test_splash_attention_in_blocks(name, results, run, needed):
    """Of 2 x 2 blocks of 512 the one right of the diagonal is skipped; backward kernels compute the scores again."""
    lines = [
        "%m = s8[1,2,2]{2,1,0} parameter(0)",
        "%q = bf16[2,4,1024,128]{3,2,1,0} parameter(1)",
        "%p = s32[1024,128]{1,0} parameter(2)",
        f'%{name} = {results} custom-call(%m, %m, %q, %q, %q, %p), custom_call_target="tpu_custom_call"',
    ]
    found = work(lines, name)
    assert found is not None
    one = 2.0 * 2 * 4 * 1024 * 1024 * 128
    assert (found.kind, found.flops) == ("attention", run * one * 3 / 4)
    assert (found.full, found.causal) == (needed * one, needed * one / 2)


def test_a_kernel_counts_what_its_author_says():
    lines = [
        "%x = f32[8]{0} parameter(0)",
        (
            '%a = f32[8]{0} custom-call(%x), custom_call_target="tpu_custom_call", '
            'backend_config={"custom_call_config":{"body":"", "cost_estimate": {"flops": 640, "transcendentals": 0}}}'
        ),
        '%b = f32[8]{0} custom-call(%x), custom_call_target="tpu_custom_call"',
    ]
    told, silent = work(lines, "a"), work(lines, "b")
    assert told is not None
    assert silent is not None
    assert (told.flops, told.known) == (640.0, True)
    assert (silent.flops, silent.known) == (0.0, False)


@pytest.mark.parametrize(
    "line",
    [
        "%d = f32[3,7]{1,0} dot(%a, %a), lhs_contracting_dims={9}, rhs_contracting_dims={0}",
        "%d = f32[3,7]{1,0} dot(), lhs_contracting_dims={1}",
        "%d = f32[3]{0} dot(%b, %c), lhs_contracting_dims={0}",
        "%d = f32[3]{0} convolution(%a, %a), window={size=1x pad=}, dim_labels=xx_yy->zz",
        "%d = f32[3]{0} convolution(%a, %a), window={size=1 lhs_dilate=0}, dim_labels=b0f_0io->b0f",
        "%d = f32[3]{0} fusion(%a), kind=kLoop, calls=%main",
        '%d = f32[3]{0} custom-call(), custom_call_target="__cudnn$fmhaSoftmax"',
        '%d = () custom-call(), custom_call_target="tpu_custom_call"',
    ],
)
def test_garbage_counts_as_nothing(line):
    found = program(["%a = f32[3,5]{1,0} parameter(0)", line])
    assert flops_of(found, found.computations["main"].ops["d"]) == 0
