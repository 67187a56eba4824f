"""Golden samples as files of NVIDIA's Polygraphy, and the commands that compare with them.

Polygraphy compares any two of PyTorch's outputs, onnxruntime and TensorRT, of whole graphs or layer
by layer. It knows nothing of this project, so it is a second opinion on its verification.
"""

from __future__ import annotations

import dataclasses
import pathlib
import shlex
from collections.abc import Callable

from tap_deploy.bundle.bundle import Bundle
from tap_deploy.bundle.golden import Golden
from tap_deploy.bundle.variant import Variant
from tap_deploy.graphs import GRAPH_NAMES, TEXT_DECODER
from tap_deploy.optional_modules import require_module
from tap_deploy.precisions import precision_of
from tap_deploy.sessions.contract import resolve_shape
from tap_deploy.sessions.run_on import ENGINE_BACKENDS
from tap_deploy.storage.files import atomic_file, translated_writes
from tap_deploy.verify.graph_cases import (
    case_sizes,
    graph_cases,
    largest_case,
    output_bounds,
)
from tap_deploy.verify.selftest import SelftestResult
from tap_deploy.verify.tolerances import Tolerances, tolerances_for

TENSORRT, TENSORRT_RTX = ENGINE_BACKENDS
INPUTS, OUTPUTS, ONE_INPUT = "inputs.json", "outputs.json", "one_input.json"
DIGEST = "logit_digest.py"
_DIGEST_PROGRAM = '''\
"""The bundle holds sums of the logits of each row only: polygraphy run compares those."""

from tap_deploy.bundle.golden import DIGEST_SIZE, logit_digest


def postprocess_outputs(result):
    if result["logits"].shape[-1] != DIGEST_SIZE:  # those of PyTorch are sums already
        result["logits"] = logit_digest(result["logits"])
    return result
'''

Chunk = list[str]  # words of a command that are printed on one line


@dataclasses.dataclass(frozen=True, kw_only=True)
class GraphFiles:
    """The files of one graph, and the commands that use them.

    Attributes:
        variant: a variant of the bundle.
        graph: one of ``GRAPH_NAMES``.
        folder: the folder of the files.
        golden: the golden samples of the bundle.
        tolerances: of the precision.
    """

    variant: Variant
    graph: str
    folder: pathlib.Path
    golden: Golden
    tolerances: Tolerances

    @classmethod
    def of(cls, bundle: Bundle, variant: str, folder: pathlib.Path) -> list[GraphFiles]:
        """Return the files of the three graphs of a variant.

        Raises:
            BundleError: the bundle lacks the variant, golden samples, or deviations of int8.
        """
        record = bundle.manifest.precision_record(variant)
        golden = bundle.golden()
        return [
            cls(
                variant=bundle.variant(variant),
                graph=graph,
                folder=folder / variant / graph,
                golden=golden,
                tolerances=tolerances_for(precision_of(variant), record),
            )
            for graph in GRAPH_NAMES
        ]

    def write(self) -> None:
        """Write the files, and replace existing ones.

        Raises:
            InputError: the folder cannot be written.
            SessionError: onnxruntime is missing, or the text decoder does not load or run.
            MissingDependencyError: Polygraphy is not installed.
        """
        require_module("polygraphy", "a file for Polygraphy", "polygraphy")
        from polygraphy.comparator import RunResults
        from polygraphy.json import save_json
        from polygraphy.logger import G_LOGGER

        cases = graph_cases(self.variant, self.graph, self.golden, self.tolerances)
        outputs = RunResults()
        outputs.add([dict(case.expected) for case in cases], runner_name="PyTorch")
        feeds = [dict(case.inputs) for case in cases]
        with translated_writes(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        with G_LOGGER.verbosity(G_LOGGER.CRITICAL):  # it logs to stdout
            for name, content in (
                (INPUTS, feeds),
                (OUTPUTS, outputs),
                (ONE_INPUT, [feeds[largest_case(self._sizes)]]),
            ):
                with atomic_file(self.folder / name) as partial:
                    save_json(content, str(partial))
        if self.graph == TEXT_DECODER:
            with atomic_file(self.folder / DIGEST) as partial:
                partial.write_text(_DIGEST_PROGRAM, "utf-8")

    def commands(self, backend: str = TENSORRT) -> str:
        """Return shell commands: the graph against PyTorch, layer by layer, reduced to a fault.

        Args:
            backend: what is under suspicion. Its layers are compared with onnxruntime's; for a
                backend on a CPU, with those of a machine that passes its self-test.
        """
        path, name = str(self.variant.path(self.graph)), f"{self.graph} in {self.variant.name}"
        is_engine = backend in ENGINE_BACKENDS
        runner = ["--trt", "--strongly-typed"] if is_engine else ["--onnxrt"]
        env = _rtx_environment() if backend == TENSORRT_RTX else []
        every = ["--onnx-outputs", "*"]
        layers, layer_inputs = self._file("layers.json"), self._file("layer_inputs.json")
        one_input, strict = ["--load-inputs", self._file(ONE_INPUT)], self._strict(largest=True)
        against_layers = [["--load-inputs", layer_inputs], ["--load-outputs", layers], strict]
        commands = [
            f"# {name}: onnxruntime against PyTorch",
            _joined([["polygraphy", "run", path, "--onnxrt"], *self._against_pytorch()]),
            f"# {name}: every layer of TensorRT against onnxruntime",
            _joined(
                [
                    [*env, "polygraphy", "run", path, "--trt", "--onnxrt", "--strongly-typed"],
                    ["--trt-outputs", "*", *every],
                    *[one_input, ["--input-shapes", *self._shapes()], strict],
                ]
            ),
            f"# {name}: the smallest part of the graph that is wrong"
            + ("" if is_engine else "; run the first command where the self-test passes"),
            _joined(
                [
                    ["polygraphy", "run", path, "--onnxrt", *every],
                    [*one_input, "--save-outputs", layers],
                ]
            ),
            _joined([["polygraphy", "data", "merge", one_input[1], layers, "-o", layer_inputs]]),
            _joined(
                [
                    [*env, "polygraphy", "debug", "reduce", path],
                    ["-o", self._file("reduced.onnx")],
                    ["--model-input-shapes", *self._shapes()],
                    ["--load-inputs", layer_inputs],
                    ["--check", "polygraphy", "run", "polygraphy_debug.onnx", *runner],
                    *against_layers,
                ]
            ),
        ]
        return "\n".join(commands)

    @property
    def _sizes(self) -> list[dict[str, int]]:
        return case_sizes(self.graph, self.variant.config, self.golden, self.tolerances)

    def _file(self, name: str) -> str:
        return str(self.folder / name)

    def _against_pytorch(self) -> list[Chunk]:
        chunks = [
            ["--load-inputs", self._file(INPUTS)],
            ["--load-outputs", self._file(OUTPUTS)],
            self._strict(),
        ]
        if self.graph == TEXT_DECODER:
            chunks.append(["--postprocess-func-script", self._file(DIGEST)])
        return chunks

    def _strict(self, *, largest: bool = False) -> Chunk:
        """Return the options for the tolerances; ``largest`` applies to outputs without one."""
        bounds = output_bounds(self.graph, self.golden, self.tolerances)
        default = max(bounds.values()) if largest else 0.0
        named = (f"{name}:{bound:.6g}" for name, bound in bounds.items())
        return ["--check-error-stat", "max", "--rtol", "0", "--atol", f"{default:.6g}", *named]

    def _shapes(self) -> Chunk:
        """Return the shapes of the inputs with dynamic axes, in the largest case."""
        sizes = self._sizes[largest_case(self._sizes)]
        shapes = {
            tensor.name: resolve_shape(tensor, sizes)
            for tensor in self.variant.specs[self.graph].inputs
            if tensor.dynamic_axes
        }
        return [f"{name}:[{','.join(map(str, shape))}]" for name, shape in shapes.items()]


def write_polygraphy(
    bundle: Bundle, folder: pathlib.Path, *, on_graph: Callable[[str], None] | None = None
) -> list[GraphFiles]:
    """Write the golden samples of a bundle for all graphs of all variants.

    Args:
        bundle: an opened bundle.
        folder: gets a folder per variant and graph.
        on_graph: called before each graph with its name.

    Raises:
        TapError: see ``GraphFiles.of`` and ``GraphFiles.write``.
    """
    written = []
    for variant in bundle.manifest.graphs:
        for files in GraphFiles.of(bundle, variant, folder):
            if on_graph is not None:
                on_graph(f"{variant} {files.graph}")
            files.write()
            written.append(files)
    return written


def commands_after(result: SelftestResult, folder: pathlib.Path) -> str:
    """Return shell commands that look into a failed self-test, for the graphs that failed.

    Args:
        result: the failed self-test.
        folder: where the first command writes the files for the others.
    """
    subject = result.subject
    failed = {check.graph for check in result.checks if not check.passed}
    files = GraphFiles.of(subject.bundle, subject.run_on.variant, folder)
    suspects = [each for each in files if each.graph in failed] or files
    write = ["tap-export", "inspect", str(subject.bundle.path), "--polygraphy", str(folder)]
    return "\n".join(
        [
            '# To look for the fault with Polygraphy: pip install "tap-deploy[polygraphy]"',
            shlex.join(write),
            *(each.commands(subject.run_on.backend) for each in suspects),
        ]
    )


def _rtx_environment() -> Chunk:
    # Polygraphy leaves TF32 on for RTX.
    return ["env", "POLYGRAPHY_USE_TENSORRT_RTX=1", "NVIDIA_TF32_OVERRIDE=0"]


def _joined(chunks: list[Chunk]) -> str:
    return " \\\n    ".join(map(shlex.join, chunks))
