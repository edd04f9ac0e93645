"""What every test module shares: the random profile, the GPU guard and golden texts."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Generator
from pathlib import Path
from unittest.mock import patch

import hypothesis
import pytest

GOLDEN = Path(__file__).parent / "golden"

# Inputs are drawn afresh on every run; `print_blob` makes a failure on another machine repeatable.
# How long a draw takes says what else the machine does, so no test fails for it.
hypothesis.settings.register_profile(
    "ingot",
    deadline=None,
    max_examples=30,
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("ingot")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden",
        action="store_true",
        help="write the golden texts under tests/golden instead of comparing with them",
    )
    parser.addoption(
        "--device",
        action="store_true",
        help="run the nodes of kernel tests on the GPU of this machine, not in an interpreter",
    )


def _cpu_flags() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="ascii", errors="replace").split() if path.is_file() else []


def pytest_configure(config: pytest.Config) -> None:
    """Before torch is imported: the same bits in every batch, which many tests hold, and the cores
    shared out among the xdist workers; torch would take all of them in each."""
    if "avx512f" in _cpu_flags():
        # MKL has other GEMM kernels there for other batch sizes, whose sums are rounded otherwise.
        os.environ.setdefault("MKL_CBWR", "AVX512,STRICT")
    if config.getoption("--device"):
        os.environ["INGOT_TEST_KERNELS"] = "device"  # for kernel_checks, in workers too
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers > 1:
        threads = max(1, (os.cpu_count() or 1) // workers)
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))


@pytest.fixture(autouse=True)
def _gpu_is_there(request: pytest.FixtureRequest) -> None:
    """A test marked `gpu` that was selected fails, rather than passes unseen, without a GPU."""
    if request.node.get_closest_marker("gpu") is None:
        return
    import torch

    if not torch.cuda.is_available():
        pytest.fail("marked gpu, and torch sees no GPU; deselect with -m 'not gpu'", pytrace=False)


@pytest.fixture(scope="module")
def shared_traces() -> Generator[None]:
    """For modules whose subject comes after tracing; see tests/helpers/shared_traces.py."""
    import shared_traces

    with shared_traces.sharing():
        yield


@pytest.fixture(scope="session", autouse=True)
def _prices_of_this_version(tmp_path_factory: pytest.TempPathFactory) -> Generator[None]:
    """What was tuned on this machine changes no choice of kernels, nor the texts that show it."""
    from ingot.codegen import price_table

    nothing = tmp_path_factory.mktemp("prices") / "none.json"
    with patch.object(price_table, "user_table", lambda target: nothing):
        yield


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """`golden(text)` compares with tests/golden/<module>/<test>.txt, once a test.

    `pytest --update-golden` writes the file; read the diff of what it wrote before committing it.
    """
    name = re.sub(r"[^\w.-]+", "-", request.node.name).strip("-")
    path = GOLDEN / request.path.stem / f"{name}.txt"
    compared: list[str] = []

    def compare(text: str) -> None:
        assert not compared, "golden() was called before in this test: one golden text a test"
        compared.append(text)
        found = text.rstrip("\n") + "\n"
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(found, encoding="utf-8")
            return
        shown = os.path.relpath(path, request.config.rootpath)
        if not path.exists():
            pytest.fail(
                f"no golden text {shown}; create it with: "
                f"pytest --update-golden '{request.node.nodeid}'\n\n{found}",
                pytrace=False,
            )
        expected = path.read_text(encoding="utf-8")
        if found != expected:
            diff = difflib.unified_diff(
                expected.splitlines(), found.splitlines(), shown, "this run", lineterm=""
            )
            pytest.fail(
                "\n".join([*diff, "", "if that is what it should be: pytest --update-golden"]),
                pytrace=False,
            )

    return compare
