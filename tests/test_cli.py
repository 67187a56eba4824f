"""The command line: results on stdout, one line and an exit code for every error."""

from __future__ import annotations

import json
import pickle
import shlex
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tap_deploy import __version__
from tap_deploy.cli import COMMANDS
from tests.commands import invoke, refused

PROMPTS = ["--point", "285,160", "--box", "172,17,412,308"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory, assets):
    """Exported by the command itself."""
    path = tmp_path_factory.mktemp("cli") / "bundle"
    result = invoke("export", *inputs(assets), "-o", path)
    assert result.exit_code == 0, result.output
    assert "PASSED: 72 comparisons, 0 failed" in result.stdout
    assert "ops  " in result.stdout
    return path


def inputs(assets, **replaced):
    options = {**assets, **replaced}
    return [part for name, path in options.items() if path for part in (f"--{name}", path)]


@pytest.fixture
def copy(bundle, tmp_path):
    return shutil.copytree(bundle, tmp_path / "copy")


def test_run_as_json(bundle, photo, tmp_path):
    sketch = photo.parent / "sketch.json"
    overlay = tmp_path / "overlay.png"
    result = invoke(
        "run", bundle, photo, *PROMPTS, "--sketch", sketch, "--json", "--overlay", overlay
    )
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout)
    assert len(values["regions"]) == 3
    with Image.open(photo) as original, Image.open(overlay) as drawn:
        assert drawn.size == original.size
        assert np.asarray(drawn).std() > 0
        assert (np.asarray(drawn.convert("RGB")) != np.asarray(original)).any()


def test_run_for_people(bundle, photo):
    result = invoke("run", bundle, photo, *PROMPTS, "--top-k", 2, "--max-new-tokens", 5)
    assert result.exit_code == 0, result.output
    assert [line.split("  ")[0] for line in result.stdout.splitlines()] == ["region 0", "region 1"]


def test_run_equals_the_python_api(bundle, photo, predictor):
    result = invoke("run", bundle, photo, *PROMPTS, "--json")
    from tap_deploy import Prompts

    regions = predictor.predict(
        photo,
        prompts=Prompts.concatenate(
            [Prompts.from_points([[[285, 160, 1]]]), Prompts.from_boxes([[172, 17, 412, 308]])]
        ),
    )
    assert json.loads(result.stdout) == json.loads(regions.to_json())


def test_verify(bundle):
    result = invoke("verify", bundle, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["passed"] is True
    assert len(report["checks"]) == 51


def test_verify_against_the_checkpoint(bundle, assets):
    result = invoke("verify", bundle, "--checkpoint", assets["checkpoint"])
    assert result.exit_code == 0, result.output
    assert "PASSED: 72 comparisons" in result.stdout


def test_verify_fails_with_1_on_another_model(bundle, micro_config, tmp_path):
    """The same architecture with other weights: all hashes are right, the outputs are not."""
    from tap_deploy.reference.checkpoint import save_checkpoint
    from tap_deploy.reference.synthetic import synthetic_state_dict

    save_checkpoint(synthetic_state_dict(micro_config, 1), tmp_path / "other.pkl")
    result = invoke("verify", bundle, "--checkpoint", tmp_path / "other.pkl")
    assert result.exit_code == 1
    assert "[✗] image_encoder" in result.stdout
    assert result.stderr.startswith("error: bundle ")
    assert "do not use it" in result.stderr


def test_inspect(bundle):
    text = invoke("inspect", bundle).stdout
    assert "past_key_values.0.key float32 [P, 2, T, 64]" in text
    assert "verified    passed, 72 comparisons" in text
    manifest = json.loads(invoke("inspect", bundle, "--json").stdout)
    assert manifest["checkpoint"]["file"] == "tap_micro.pkl"
    assert len(manifest["checkpoint"]["sha256"]) == 64


def test_export_as_json_and_force(bundle, assets, copy, tmp_path):
    weights = pickle.loads(assets["checkpoint"].read_bytes())
    trained = tmp_path / "trained.pkl"
    trained.write_bytes(pickle.dumps({"model": {f"module.{n}": w for n, w in weights.items()}}))
    options = inputs(assets, checkpoint=trained)
    result = invoke("export", *options, "-o", copy, "--force", "--json")
    assert result.exit_code == 0, result.output
    assert result.stderr == "note: trained.pkl was read without model.module. in names\n"
    values = json.loads(result.stdout)
    assert values["verification"]["passed"] is True
    assert values["graphs"]["fp32"]["image_encoder"]["op_types"]["Softmax"] == 4


def test_synthetic_weights_are_said_to_be_so(assets, tmp_path, photo):
    result = invoke(
        "export", "--config", assets["config"], "--synthetic-weights", 0, "-o", tmp_path / "b"
    )
    assert result.exit_code == 0, result.output
    result = invoke("run", tmp_path / "b", photo, *PROMPTS)
    assert result.exit_code == 0, result.output
    assert "synthetic weights" in result.stderr
    values = json.loads(invoke("run", tmp_path / "b", photo, *PROMPTS, "--json").stdout)
    assert values["regions"][0]["caption"] is None
    assert values["regions"][0]["caption_ids"]


@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        ({"checkpoint": "nowhere.pkl"}, "nowhere.pkl"),
        ({"concepts": "nowhere.npz"}, "nowhere.npz"),
        ({"tokenizer": "nowhere.model"}, "nowhere.model"),
        ({"config": "nowhere.json"}, "nowhere.json cannot be read as JSON"),
        ({"config": None}, "pass either --model or --config"),
        ({"checkpoint": None}, "pass either --checkpoint or --synthetic-weights"),
    ],
)
def test_export_refuses_missing_inputs(assets, tmp_path, replaced, message):
    refused(invoke("export", *inputs(assets, **replaced), "-o", tmp_path / "b"), message)
    assert list(tmp_path.iterdir()) == []


def test_export_refuses_a_checkpoint_of_another_model(assets, tmp_path):
    args = ["--model", "tap_vit_b", "--checkpoint", assets["checkpoint"], "-o", tmp_path / "b"]
    refused(invoke("export", *args), "image_encoder")


def test_export_refuses_foreign_and_corrupt_files(assets, tmp_path, photo):
    cut = tmp_path / "cut.pkl"
    cut.write_bytes(assets["checkpoint"].read_bytes()[:5000])
    for checkpoint in (photo, cut):
        options = inputs(assets, checkpoint=checkpoint)
        refused(invoke("export", *options, "-o", tmp_path / "b"), checkpoint.name)


def test_export_refuses_a_bad_config(assets, tmp_path):
    config = tmp_path / "odd.json"
    values = json.loads(assets["config"].read_text("utf-8"))
    config.write_text(json.dumps(values | {"window_size": 10}), "utf-8")
    options = inputs(assets, config=config)
    refused(
        invoke("export", *options, "-o", tmp_path / "b"),
        "config: the token grid is 32; expected a multiple of window_size (10)",
    )


def test_export_refuses_existing_output(assets, bundle):
    refused(invoke("export", *inputs(assets), "-o", bundle), "already exists; pass --force")


def test_export_refuses_an_output_that_cannot_be_written(assets, tmp_path):
    (tmp_path / "file").write_text("", "utf-8")
    refused(
        invoke("export", *inputs(assets), "-o", tmp_path / "file" / "b"), "choose a folder that can"
    )


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "no prompt: pass --point, --box, --sketch, --boxes or --everything"),
        (["--point", "nan,3"], "NaN"),
        (["--point", "601,3"], "lies outside the picture"),
        (["--point", "3,3,7"], "label 7"),
        (["--point", "3"], "3"),
        (["--box", "9,9,3,3"], "no area"),
        (["--sketch", "nowhere.json"], "nowhere.json"),
        ([*PROMPTS, "--backend", "abacus"], "unknown backend 'abacus'"),
        ([*PROMPTS, "--threads", "99999"], "threads is 99999; expected 1 to "),
        ([*PROMPTS, "--precision", "int8"], "has no precision 'int8'"),
        ([*PROMPTS, "--concepts", "nowhere.npz"], "nowhere.npz"),
        ([*PROMPTS, "--overlay", "/dev/null/x.png"], "/dev/null/x.png"),
    ],
)
def test_run_refuses(bundle, photo, args, message):
    refused(invoke("run", bundle, photo, *args), message)


def test_run_refuses_an_overlay_that_exists(bundle, photo, tmp_path):
    overlay = tmp_path / "overlay.png"
    overlay.write_text("precious", "utf-8")
    args = ["run", bundle, photo, *PROMPTS, "--overlay", overlay]
    refused(invoke(*args), "already exists; pass --force")
    assert overlay.read_text("utf-8") == "precious"
    assert invoke(*args, "--force").exit_code == 0


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "I;16", "P"])
def test_run_refuses_pictures_that_are_not_rgb(bundle, tmp_path, mode):
    path = tmp_path / ("picture.tif" if mode == "CMYK" else "picture.png")
    Image.new(mode, (500, 400)).save(path)
    refused(invoke("run", bundle, path, "--point", "9,9"), "picture")
    converted = invoke("run", bundle, path, "--point", "9,9", "--convert")
    assert converted.exit_code == 0, converted.output


def test_run_refuses_changed_and_truncated_bundles(copy, photo):
    graph = copy / "onnx" / "fp32" / "prompt_decoder.onnx"
    content = bytearray(graph.read_bytes())
    content[-100] ^= 1
    graph.write_bytes(content)
    refused(invoke("run", copy, photo, *PROMPTS), "prompt_decoder.onnx was changed")
    graph.write_bytes(content[:-100])
    refused(invoke("verify", copy), "prompt_decoder.onnx has")
    graph.unlink()
    refused(invoke("inspect", copy), "prompt_decoder.onnx is missing")
    refused(invoke("inspect", copy / "nowhere"), "is not a folder")


def test_version_help_and_completion():
    assert invoke("--version").stdout.strip() == f"tap-export, version {__version__}"
    for command in COMMANDS:
        assert command in invoke("--help").stdout
        assert "--help" in invoke(command, "--help").stdout
    for shell in ("bash", "zsh", "fish"):
        assert "_TAP_EXPORT_COMPLETE" in invoke("completion", shell).stdout


def test_an_empty_path_is_not_the_working_folder(bundle, assets, tmp_path, monkeypatch):
    """Such as from an unset variable: with --force it would replace the working folder."""
    monkeypatch.chdir(shutil.copytree(bundle, tmp_path / "here"))
    for args in (
        ["export", *inputs(assets), "-o", "", "--force"],
        ["export", "--model", "tap_vit_b", "--checkpoint", "", "-o", "x"],
        ["inspect", ""],
    ):
        refused(invoke(*args), "the path is empty")
    assert (tmp_path / "here" / "manifest.json").is_file()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nonsense"], "No such command 'nonsense'"),
        (["run"], "Missing argument 'BUNDLE'. See: "),
        (["completion"], "fish. See: "),
        (["run", "a", "b", "--top-k", "many"], "'many' is not a valid integer"),
        (["run", "a", "b", "--top-k", "0"], "0 is not in the range"),
        (["run", "a", "b", "--temperature", "-1"], "-1.0 is not in the range"),
        (["run", "a", "b", "--threads", "0"], "0 is not in the range"),
    ],
)
def test_usage_errors(args, message):
    refused(invoke(*args), message)


def test_force_does_not_delete_what_it_reads(bundle, assets, tmp_path):
    """An output that contains an input, or is not a bundle, is not replaced."""
    folder = shutil.copytree(bundle, tmp_path / "mixed")
    inside = shutil.copy(assets["checkpoint"], folder)
    options = inputs(assets, checkpoint=inside)
    refused(invoke("export", *options, "-o", folder, "--force"), "lies inside the output")
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "precious").write_text("1", "utf-8")
    refused(
        invoke("export", *inputs(assets), "-o", tmp_path / "models", "--force"),
        "is not a folder with manifest.json",
    )
    assert (tmp_path / "models" / "precious").exists()


def test_an_overlay_can_be_enlarged(bundle, photo, tmp_path):
    overlay = tmp_path / "large.png"
    args = ["run", bundle, photo, "--point", "285,160", "--overlay", overlay]
    assert invoke(*args, "--overlay-scale", "2").exit_code == 0
    with Image.open(photo) as original, Image.open(overlay) as drawn:
        assert drawn.size == (2 * original.width, 2 * original.height)
    refused(invoke(*args, "--overlay-scale", "17"), "17 is not in the range")


def test_overlay_is_a_png_beside_the_picture(bundle, photo, tmp_path):
    run = ["run", bundle, photo, *PROMPTS, "--force", "--overlay"]
    refused(invoke(*run, tmp_path / "overlay.jpg"), "choose a name that ends in .png")
    refused(invoke(*run, tmp_path / "nowhere" / "overlay.png"), "choose a folder that can be")
    copied = tmp_path / "copy.png"
    Image.open(photo).save(copied)
    args = ["run", bundle, copied, *PROMPTS, "--force", "--overlay", copied]
    refused(invoke(*args), "is the picture itself")


def test_output_that_cannot_be_written(bundle):
    """A full disk is an error; a reader that exits early is not."""
    code = "from tap_deploy.cli import main; main()"
    command = [sys.executable, "-c", code, "inspect", str(bundle)]
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert result.returncode == 2
    assert "No space left" in result.stderr
    assert result.stderr.count("\n") == 1
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    _, errors = process.communicate()
    assert process.returncode == 141
    assert errors == b""


def test_streams_that_cannot_be_written_leave_the_exit_code(bundle, tmp_path):
    """Notes, such as those of ``run`` about an 11-bit grey picture, do not change it either."""
    program = shlex.join([sys.executable, "-m", "tap_deploy", "inspect"])
    deep = tmp_path / "deep.png"
    Image.fromarray(np.full((40, 40), 2000, np.uint16)).save(deep)
    run = [sys.executable, "-m", "tap_deploy", "run", str(bundle), str(deep), "--point", "9,9"]
    run += ["--convert", "--no-captions"]
    for command, code in (
        (f"{program} {shlex.quote(str(bundle))} >&-", 0),
        (f"{program} nowhere >&-", 2),
        (f"{program} nowhere 2>&-", 2),
        (f"{program} nowhere 2>/dev/full", 2),
        (f"{shlex.join(run)} 2>&-", 0),
        (f"{shlex.join(run)} 2>/dev/full", 0),
        (f"{shlex.join(run)} - <&-", 2),
    ):
        result = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
        assert result.returncode == code, command
        assert "Traceback" not in result.stderr
    assert "stdin, which is closed" in result.stderr


def test_the_way_to_end_is_put_back():
    before = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGHUP)]
    invoke("--version")
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGHUP)] == before


def test_a_hang_up_that_nohup_ignores_stays_ignored():
    code = "import signal; from tap_deploy.cli import main; main(['--version'], standalone_mode=0)"
    show = "; print(signal.getsignal(signal.SIGHUP).name)"
    command = ["nohup", sys.executable, "-c", code + show]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "SIG_IGN"


@pytest.mark.parametrize(
    ("number", "message"),
    [(signal.SIGTERM, "terminated"), (signal.SIGHUP, "the terminal was closed")],
)
def test_a_terminated_command_cleans_up(tmp_path, number, message):
    code = """
import signal, sys, time, click
from tap_deploy.console.exits import CleanExits
from tap_deploy.storage.files import atomic_folder

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup

@click.command(cls=CleanExits)
def work():
    with atomic_folder("folder", marker="x"):
        print("ready", flush=True)
        time.sleep(600)

work()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    assert list(tmp_path.iterdir())
    process.send_signal(number)
    _, errors = process.communicate()
    assert (process.returncode, errors) == (128 + number, f"error: {message}\n")
    assert not list(tmp_path.iterdir())


def test_without_a_command_there_is_help():
    result = invoke()
    assert result.exit_code == 0
    assert result.stdout == invoke("--help").stdout
    assert "samples" in result.stdout


def test_interruption_and_defects_are_no_failed_checks(monkeypatch, bundle):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("tap_deploy.cli.inspect.Bundle.open", stop)
    assert invoke("inspect", bundle).exit_code == 130

    def crash(*args, **kwargs):
        raise ZeroDivisionError

    monkeypatch.setattr("tap_deploy.cli.inspect.Bundle.open", crash)
    result = invoke("inspect", bundle)
    assert result.exit_code == 2
    assert "internal error, please report it: ZeroDivisionError" in result.stderr


def test_installed_command_is_silent_without_a_terminal(bundle):
    command = [
        sys.executable,
        "-c",
        "from tap_deploy.cli import main; main()",
        "verify",
        str(bundle),
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0
    assert result.stderr == ""
    assert "PASSED" in result.stdout
