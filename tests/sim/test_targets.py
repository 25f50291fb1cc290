"""Instructions need their minimum target, and launches must keep to the limits of the GPU."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from support.opcodes import HEADER, kernel
from torchext import sim

TARGETS = (
    "sm_75", "sm_80", "sm_86", "sm_87", "sm_89", "sm_90", "sm_90a", "sm_100", "sm_100a", "sm_103a",
    "sm_120", "sm_120a",
)  # fmt: skip
FORBIDDEN = {  # {title of a section in target_examples.txt: targets that refuse it}
    **{name: {t for t in TARGETS if int(re.sub(r"\D", "", t)) < int(name[3:])}
       for name in ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100")},
    "sm_90a and later a": {*TARGETS} - {"sm_90a", "sm_100a", "sm_103a", "sm_120a"},
    "sm_90a alone": {*TARGETS} - {"sm_90a"},
    "sm_100a and later a": {*TARGETS} - {"sm_100a", "sm_103a", "sm_120a"},
    "sm_100a, sm_103a": {*TARGETS} - {"sm_100a", "sm_103a"},
}  # fmt: skip
REGISTERS = (
    ".reg .pred %p<8>; .reg .b16 %h<16>; .reg .b32 %r<64>; .reg .f32 %f<160>; .reg .b64 %rd<16>; "
    ".reg .f64 %d<16>; .shared .align 128 .b8 sm[1024];\n"
)


def examples() -> list[tuple[str, str]]:
    """The pairs (section, instruction) of target_examples.txt."""
    section, found = "", []
    for line in Path(__file__).with_name("target_examples.txt").read_text().splitlines():
        if line.startswith("# "):
            section = line[2:]
        else:
            found.append((section, line))
    return found


EXAMPLES = examples()


def text(target: str, lines: list[str], version: str = "9.0") -> str:
    head = f".version {version}\n.target {target}\n.address_size 64\n"
    wide = ".reg .b128 %q<4>; " if any("%q" in line for line in lines) else ""
    body = wide + REGISTERS + "\n".join(lines)
    return head + ".visible .entry k()\n{\n" + body + "\nret;\n}\n"


def refused(target: str, instruction: str) -> str | None:
    """The simulator's objection to the target, if it has one."""
    try:
        sim.Module(text(target, [instruction])).check("k")
    except sim.PtxError as error:
        return str(error) if ".target must be" in str(error) else None
    return None


@pytest.mark.parametrize("target", TARGETS)
def test_minimum_targets(target):
    wrong = [
        (section, instruction)
        for section, instruction in EXAMPLES
        if "%q" not in instruction  # the simulator has no 128-bit registers
        and (refused(target, instruction) is not None) != (target in FORBIDDEN[section])
    ]
    assert wrong == []


PTXAS = shutil.which("ptxas") or "/usr/local/cuda/bin/ptxas"


@pytest.mark.skipif(not Path(PTXAS).exists(), reason="there is no ptxas to compare with")
@pytest.mark.parametrize("target", TARGETS)
def test_ptxas_agrees(target, tmp_path):
    path = tmp_path / "k.ptx"
    path.write_text(text(target, [instruction for _, instruction in EXAMPLES]))
    done = subprocess.run(
        [PTXAS, f"-arch={target}", str(path), "-o", "/dev/null"], capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    if re.search("Unsupported .version|is not defined for option", done.stderr):
        pytest.skip("this ptxas does not know the target or PTX 9.0")
    first = text(target, []).count("\n") - 2
    lines = {int(n) - first for n in re.findall(r"line (\d+); error", done.stderr)}
    wrong = [
        instruction
        for index, (section, instruction) in enumerate(EXAMPLES)
        if (index in lines) != (target in FORBIDDEN[section])
    ]
    assert wrong == []


def test_the_error_names_the_line_and_both_targets():
    module = sim.Module(text("sm_80", ["mov.u32 %r1, 0;", "barrier.cluster.arrive;"]), "my.ptx")
    expected = r"my\.ptx:8: barrier.cluster.arrive: \.target must be sm_90 or later \(got sm_80\)$"
    for use in (lambda: module.check("k"), lambda: module.launch("k", grid=1, block=1)):
        with pytest.raises(sim.PtxError, match=expected):
            use()


@pytest.mark.parametrize(
    "target, instruction, needs",
    [
        ("sm_90", "wgmma.fence.sync.aligned;", ".target must be sm_90a (got sm_90)"),
        ("sm_100a", "wgmma.fence.sync.aligned;", ".target must be sm_90a (got sm_100a)"),
        ("sm_90", "setmaxnreg.inc.sync.aligned.u32 64;", ".target must be sm_90a or a later"),
        ("sm_75", "cp.async.bulk.commit_group;", "sm_90 or later"),
        ("sm_75", "mov.u32 %r1, %cluster_ctarank;", "%cluster_ctarank: .target must be sm_90"),
        ("sm_80", "@%p1 elect.sync %r1|%p1, -1;", "sm_90 or later"),
        ("sm_86", "cvt.rn.satfinite.e4m3x2.f32 %h1, %f1, %f2;", "sm_89 or later"),
    ],
)
def test_what_is_needed_is_said(target, instruction, needs):
    assert needs in (refused(target, instruction) or "")


def test_functions_that_a_kernel_calls_are_checked():
    function = ".func f()\n{\nbarrier.cluster.arrive;\nret;\n}\n"
    module = sim.Module(
        HEADER.format(target="sm_80") + function + ".visible .entry k()\n{\ncall f;\nret;\n}\n"
    )
    with pytest.raises(sim.PtxError, match=r":6: barrier\.cluster"):
        module.check("k")


@pytest.mark.parametrize("directive", [".reqnctapercluster 2, 1, 1", ".explicitcluster"])
def test_cluster_directives_need_hopper(directive):
    for target in ("sm_75", "sm_89"):
        module = sim.Module(
            HEADER.format(target=target) + f".visible .entry k()\n{directive}\n{{\nret;\n}}\n"
        )
        with pytest.raises(sim.PtxError, match=r"\.target must be sm_90 or later"):
            module.check("k")


# ---- limits of a launch -------------------------------------------------------------------------

SHARED = {
    "sm_75": 64, "sm_80": 163, "sm_86": 99, "sm_87": 163, "sm_89": 99, "sm_90": 227, "sm_90a": 227,
    "sm_100": 227, "sm_100a": 227, "sm_103": 227, "sm_120": 99, "sm_120a": 99, "sm_70": 64,
}  # fmt: skip


def launch(target, body="", **options):
    options = {"grid": 1, "block": 1, **options}
    return kernel(body, "", target).launch("kernel", **options)


@pytest.mark.parametrize("target", SHARED)
def test_shared_memory_of_a_block(target):
    most = SHARED[target] * 1024
    assert launch(target, smem=most).ok
    number = re.sub(r"\D", "", target)
    with pytest.raises(ValueError, match=rf"at most {most} bytes .got {most + 1}, .* are dynamic"):
        launch(target, smem=most + 1)
    static = ".shared .align 16 .b8 s[1024];\nmov.u32 %r1, s;"
    assert launch(target, static, smem=most - 1024).ok
    with pytest.raises(
        ValueError, match=f"a block on sm_{'75' if number == '70' else number}|sm_70"
    ):
        launch(target, static, smem=most - 1023)


def test_static_shared_memory():
    body = ".shared .align 16 .b8 s[{}];\nmov.u32 %r1, s;"
    for target in ("sm_75", "sm_90a"):
        assert launch(target, body.format(48 * 1024)).ok
        with pytest.raises(
            sim.PtxError, match=r"static shared memory must be at most 49152 bytes .got 49153"
        ):
            launch(target, body.format(48 * 1024 + 1))


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(block=1025), r"block.x must be at most 1024 \(got 1025\)"),
        (dict(block=(33, 32)), r"block must have at most 1024 threads \(got 1056\)"),
        (dict(block=(1, 1, 65)), r"block.z must be at most 64 \(got 65\)"),
        (dict(block=(1, 1025)), r"block.y must be at most 1024 \(got 1025\)"),
        (dict(block=(2, 0)), r"block must not be empty \(got 2 x 0 x 1\)"),
        (dict(grid=0), r"grid must not be empty \(got 0 x 1 x 1\)"),
        (dict(grid=(1, 65536)), r"grid.y must be at most 65535 \(got 65536\)"),
        (dict(grid=(1, 1, 65536)), r"grid.z must be at most 65535 \(got 65536\)"),
        (dict(grid=2**31), r"grid.x must be at most 2147483647 \(got 2147483648\)"),
        (
            dict(grid=4, cluster=3),
            r"grid must be a multiple of .*, 3 x 1 x 1 \(got 4 x 1",
        ),
        (dict(grid=(2, 3), cluster=(1, 2)), "must be a multiple of the cluster, 1 x 2 x 1"),
        (dict(grid=16, cluster=16), r"most 8 CTAs \(got 16\); pass non_portable_cluster=True"),
        (dict(grid=18, cluster=18, non_portable_cluster=True), r"at most 16 CTAs \(got 18\)"),
    ],
    ids=str,
)
def test_launches_that_exceed_the_gpu(options, message):
    with pytest.raises(ValueError, match=f"launch of 'kernel': .*{message}"):
        launch("sm_90a", **options)


def test_launches_at_the_limits():
    for block in (1024, (32, 32), (4, 4, 64), (1, 1024)):
        assert launch("sm_90a", block=block).ok
    assert launch("sm_90", grid=(1, 70), block=1).ok
    assert launch("sm_90", grid=8, cluster=8).ok
    assert launch("sm_90", grid=16, cluster=16, non_portable_cluster=True).ok


@pytest.mark.parametrize("target", ["sm_75", "sm_80", "sm_89"])
def test_clusters_need_hopper(target):
    with pytest.raises(ValueError, match=f"cluster must be one CTA before sm_90 .*on {target}"):
        launch(target, grid=2, cluster=2)
    assert launch(target, grid=2, cluster=1).ok


def test_an_unknown_target():
    with pytest.raises(ValueError, match=r"whose limits the simulator knows \(got sm_95\)"):
        launch("sm_95")


def test_directives_of_the_kernel():
    def with_directive(directive, **options):
        module = sim.Module(
            HEADER.format(target="sm_90a") + f".visible .entry k()\n{directive}\n{{\nret;\n}}\n"
        )
        return module.launch("k", **{"grid": 2, "block": 32, **options})

    with pytest.raises(ValueError, match=r"at most 32 threads, as .*.maxntid says \(got 64\)"):
        with_directive(".maxntid 32, 1, 1", block=64)
    with pytest.raises(
        ValueError, match=r"block must be 64 x 1 x 1, as .* .reqntid says \(got 32 x"
    ):
        with_directive(".reqntid 64, 1, 1")
    with pytest.raises(
        ValueError, match=r"must be 2 x .* .reqnctapercluster says \(got 1 x 2 x 1\)"
    ):
        with_directive(".reqnctapercluster 2, 1, 1", grid=(2, 2), cluster=(1, 2))
    assert with_directive(".reqnctapercluster 2, 1, 1").ok


def test_ops_run_on_the_simulated_gpu():
    """sm_80's kernels on a GPU with less shared memory: the launcher keeps to that GPU's limit."""
    import torch

    import torchext

    a, a_scale = torchext.ops.quantize_1x128(torch.randn(40, 256))
    b, b_scale = torchext.ops.quantize_128x128(torch.randn(72, 256))
    for capability in (80, 86):
        with sim.simulate(compute_capability=capability) as simulation:
            torchext.ops.fp8_gemm_nt(a, a_scale, b, b_scale)
        assert all(report.ok for report in simulation.reports)
    assert np.isfinite(a_scale.numpy()).all()
