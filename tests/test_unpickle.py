"""The safe unpickler accepts arrays and plain containers, and rejects attacks."""

from __future__ import annotations

import io
import os
import pickle
import random
import shutil
import struct
from collections import Counter, OrderedDict
from pathlib import Path, PurePosixPath

import numpy as np
import pytest

from tap_deploy.errors import CheckpointError, TapError, UnsafeCheckpointError
from tap_deploy.storage.pickled_values import Constructors, Symbol
from tap_deploy.storage.unpickle import MAX_INSTRUCTIONS, load_pickle

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)


def load_bytes(folder: Path, data: bytes) -> object:
    path = folder / "weights.pkl"
    path.write_bytes(data)
    return load_pickle(path)


def one_line(error: pytest.ExceptionInfo[TapError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    assert message.isprintable()
    assert len(message) < 500
    return message


def refused(folder: Path, data: bytes) -> str:
    with pytest.raises(UnsafeCheckpointError) as error:
        load_bytes(folder, data)
    return one_line(error)


def rejected(folder: Path, data: bytes) -> str:
    with pytest.raises(CheckpointError) as error:
        load_bytes(folder, data)
    return one_line(error)


def reduce_to(function: object, *arguments: object) -> object:
    class Evil:
        def __reduce__(self):
            return function, arguments

    return Evil()


# What must load


DTYPES = ["?", "u1", "i2", "u4", "i8", "f2", "f4", "f8", "c8", "c16", "S3", "U4", ">f4", ">U4"]


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_arrays_of_every_plain_dtype_are_rebuilt(tmp_path, dtype, protocol):
    for count in (6, 6000):  # NumPy copies small buffers and adopts large ones
        array = np.arange(count).astype(dtype).reshape(2, -1)
        loaded = load_bytes(tmp_path, pickle.dumps(array, protocol))
        assert type(loaded) is np.ndarray
        assert loaded.dtype == array.dtype.newbyteorder("=")
        assert loaded.dtype.isnative
        assert loaded.flags.writeable
        np.testing.assert_array_equal(loaded, array)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_arrays_of_every_layout_are_rebuilt(tmp_path, protocol):
    base = np.random.default_rng(0).normal(size=(6, 5, 4)).astype("f4")
    read_only = base.copy()
    read_only.flags.writeable = False
    layouts = [base, np.asfortranarray(base), base.transpose(1, 2, 0), base[::2, 1:], read_only]
    layouts += [np.zeros((0, 3), "f4"), np.array(2.5), np.asfortranarray(base).astype(">f8")]
    loaded = load_bytes(tmp_path, pickle.dumps(layouts, protocol))
    assert [a.shape for a in loaded] == [a.shape for a in layouts]
    for got, expected in zip(loaded, layouts, strict=True):
        assert got.flags.writeable
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_plain_values_are_rebuilt(tmp_path, protocol):
    values = {
        "ints": [0, 255, 65536, -1, 10**40, True, False, None],
        "floats": (1.5, -0.0, float("inf")),
        "text": ["", "é\n", "a" * 300, b"", b"\x00\xff", b"b" * 300],
        "sets": [set(), {1, "a", None}],
        "nested": OrderedDict(a={"b": [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)]}),
        3: np.float32(0.1),
        None: [np.int64(-7), np.bool_(True), np.dtype("f2"), np.str_("é")],
    }
    loaded = load_bytes(tmp_path, pickle.dumps(values, protocol))
    assert loaded == values
    assert list(loaded) == list(values)
    assert type(loaded["nested"]) is OrderedDict
    assert type(loaded[3]) is np.float32
    assert [type(value) for value in loaded[None]] == [type(value) for value in values[None]]


def test_bytearray_is_rebuilt(tmp_path):
    assert load_bytes(tmp_path, pickle.dumps([bytearray(b"ab")], 5)) == [bytearray(b"ab")]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_shared_values_stay_shared(tmp_path, protocol):
    array = np.arange(5000.0)
    first, second, dtype, same_dtype = load_bytes(
        tmp_path, pickle.dumps([array, array, array.dtype, array.dtype], protocol)
    )
    assert first is second
    assert dtype is same_dtype


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_names_of_numpy_1_and_2_both_load(tmp_path, protocol):
    array = np.arange(4.0)
    data = pickle.dumps([array, array[0]], protocol)
    old, new = b"numpy.core", b"numpy._core"
    # The framing of protocol 4 counts bytes, so the framed text has to be rebuilt.
    renamed = data.replace(new, old) if new in data else data.replace(old, new)
    if protocol >= 4:
        shorter = len(renamed) - len(data)
        lengths = {name: bytes([len(name)]) for name in (b"multiarray", b"numeric")}
        for name in lengths:
            for package in (old, new):
                text = package + b"." + name
                for other in (old, new):
                    wrong = bytes([len(other + b"." + name)]) + text
                    renamed = renamed.replace(wrong, bytes([len(text)]) + text)
        frame = struct.unpack("<Q", data[3:11])[0] + shorter
        renamed = renamed[:3] + struct.pack("<Q", frame) + renamed[11:]
    assert renamed != data
    loaded, scalar = load_bytes(tmp_path, renamed)
    np.testing.assert_array_equal(loaded, array)
    assert scalar == 0.0


def test_the_state_of_an_ordered_dict_is_dropped(tmp_path):
    entries = OrderedDict(a=1)
    entries._metadata = {"": {"version": 1}}  # as torch does in state dicts
    loaded = load_bytes(tmp_path, pickle.dumps(entries))
    assert loaded == {"a": 1}
    assert not vars(loaded)


# What must not load


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_shell_command_is_refused_by_name_and_not_run(tmp_path, protocol):
    marker = tmp_path / "marker"
    evil = {"weight": np.zeros(2), "x": reduce_to(os.system, f"touch {marker}")}
    message = refused(tmp_path, pickle.dumps(evil, protocol))
    assert f"{os.system.__module__}.system" in message
    assert "weights.pkl" in message
    assert not marker.exists()
    pickle.loads(pickle.dumps(evil, protocol))  # the attack itself is real
    assert marker.exists()


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    ("function", "arguments", "name"),
    [
        (eval, ("1 + 1",), "eval"),
        (exec, ("pass",), "exec"),
        (getattr, (np, "load"), "getattr"),
        (bytearray, (10**12,), "bytearray"),
        (np.load, ("x.npy",), "numpy.load"),
        (Counter, ("abc",), "collections.Counter"),
        (PurePosixPath, ("a",), "pathlib"),
        (shutil.rmtree, ("nowhere",), "shutil.rmtree"),
    ],
)
def test_functions_and_classes_are_refused_by_name(tmp_path, function, arguments, name, protocol):
    evil = reduce_to(function, *arguments)
    if function is getattr:  # a module is no argument that pickle takes; the name is enough
        evil = reduce_to(getattr, "text", "upper")
    assert name in refused(tmp_path, pickle.dumps([evil], protocol))


@pytest.mark.parametrize(
    "name",
    [
        "numpy.testing._private.utils runstring",
        "numpy.f2py.diagnose run_command",
        "numpy.f2py.crackfortran getlincoef",
        "numpy.core.multiarray fromfile",
        "numpy._core.multiarray empty",
        "numpy matrix",
        "numpy memmap",
        "numpy.rec recarray",
        "numpy.ma.core _mareconstruct",
        "numpy.random._pickle __randomstate_ctor",
        "copyreg _reconstructor",
        "copy_reg __newobj__",
        "torch._utils _rebuild_tensor_v2",
        "builtins set.__init__",
        "numpy ndarray.tofile",
        "numpy dtype.type",
        "_codecs decode",
        "operator attrgetter",
    ],
)
def test_gadget_names_are_refused_in_both_spellings(tmp_path, name):
    module, member = name.split(" ")
    shown = f"{module}.{member}"
    assert shown in refused(tmp_path, f"c{module}\n{member}\n(S'x'\ntR.".encode())
    assert shown in refused(tmp_path, f"(S'x'\ni{module}\n{member}\n.".encode())
    short = [b"\x8c" + bytes([len(part)]) + part.encode() for part in (module, member)]
    assert shown in refused(tmp_path, b"\x80\x04" + short[0] + short[1] + b"\x93.")


class Weights(np.ndarray):
    pass


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_subclasses_are_refused(tmp_path, protocol):
    array = np.arange(3.0).view(Weights)
    assert "Weights" in refused(tmp_path, pickle.dumps(array, protocol))
    masked = np.ma.masked_array([1.0, 2.0], mask=[True, False])
    assert "numpy.ma" in refused(tmp_path, pickle.dumps(masked, protocol))


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    "dtype", ["O", "V8", "M8[s]", "m8[s]", [("a", "f4"), ("b", "O")], ("f4", (2,))]
)
def test_object_structured_and_time_dtypes_are_refused(tmp_path, dtype, protocol):
    refused(tmp_path, pickle.dumps(np.dtype(dtype), protocol))
    if np.dtype(dtype).subdtype is None:
        refused(tmp_path, pickle.dumps(np.zeros(3, dtype), protocol))


def test_an_object_array_with_a_payload_is_refused_and_not_run(tmp_path):
    marker = tmp_path / "marker"
    array = np.array([reduce_to(os.system, f"touch {marker}")], dtype=object)
    refused(tmp_path, pickle.dumps(array))
    assert not marker.exists()


GET_DTYPE = b"cnumpy\ndtype\n"
GET_ARRAY = b"cnumpy._core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR"
FLOAT32 = GET_DTYPE + b"(S'f4'\nI00\nI01\ntR(I3\nS'<'\nNNNI-1\nI-1\nI0\ntb"

UNSAFE = {
    "text codec": b"c_codecs\nencode\n(V1\nVpunycode\ntR.",
    "encode of bytes": b"\x80\x03c_codecs\nencode\nC\x01aX\x06\x00\x00\x00latin1\x86R.",
    "dtype of a type string with fields": GET_DTYPE + b"(S'f4,O'\nI00\nI01\ntR.",
    "dtype with a unit": GET_DTYPE + b"(S'M8[s]'\nI00\nI01\ntR.",
    "dtype of no size": GET_DTYPE + b"(S'V0'\nI00\nI01\ntR.",
    "dtype from a dict": GET_DTYPE + b"((dI00\nI01\ntR.",
    "dtype with fields as state": GET_DTYPE
    + b"(S'f4'\nI00\nI01\ntR(I3\nS'<'\nN(S'a'\nt(dI-1\nI-1\nI0\ntb.",
    "dtype built twice": FLOAT32 + b"(I3\nS'>'\nNNNI-1\nI-1\nI0\ntb.",
    "dtype never built": GET_DTYPE + b"(S'f4'\nI00\nI01\ntR.",
    "array never built": GET_ARRAY + b".",
    "array never built, in a list": b"(" + GET_ARRAY + b"l.",
    "array never built, as a key": b"(" + GET_ARRAY + b"Nd.",
    "reconstruct of another class": b"cnumpy._core.multiarray\n_reconstruct\n"
    b"(ccollections\nOrderedDict\n(I0\ntS'b'\ntR.",
    "reconstruct of a large shape": b"cnumpy._core.multiarray\n_reconstruct\n"
    b"(cnumpy\nndarray\n(I1000000000000\ntS'b'\ntR.",
    "a list for the data of an array": GET_ARRAY + b"(I1\n(I1\nt" + FLOAT32 + b"I00\n(I1\nltb.",
    "a class as a value": b"cnumpy\nndarray\n.",
    "a class in a tuple": b"(cnumpy\nndarray\nt.",
    "a class in a list": b"(cnumpy\nndarray\nl.",
    "a class in a dict": b"(S'a'\ncnumpy\nndarray\nd.",
    "ndarray called directly": b"cnumpy\nndarray\n(I9\ntR.",
    "ndarray instantiated": b"(I9\ninumpy\nndarray\n.",
    "a call of a value": b"S'a'\n(tR.",
    "arguments that are a list": b"ccollections\nOrderedDict\n(lR.",
    "set of a string": b"c__builtin__\nset\n(S'abc'\ntR.",
    "bytes of a number": b"c__builtin__\nbytes\n(I1000000000\ntR.",
    "state on a class": b"ccollections\nOrderedDict\n(S'a'\nI1\ndb.",
    "state on a dict": b"(d(S'a'\nI1\ndb.",
    "state on an array": GET_ARRAY + b"(I1\n(I1\nt" + FLOAT32 + b"I00\nS'1234'\ntb(S'a'\nI1\ndb.",
    "an append to an array": GET_ARRAY + b"(I1\n(I1\nt" + FLOAT32 + b"I00\nS'1234'\ntbI1\na.",
    "an item of a list": b"(lI0\nI1\ns.",
    "a list as a key": b"((lI1\nd.",
    "a tuple as a key": b"((tI1\nd.",
    "a list in a set": b"\x80\x04\x8f((l\x90.",
    "new object": b"\x80\x02ccollections\nOrderedDict\n)\x81.",
    "new object with keywords": b"\x80\x04ccollections\nOrderedDict\n)}\x92.",
    "old object": b"(ccollections\nOrderedDict\no.",
    "persistent id": b"Pstorage\n.",
    "binary persistent id": b"\x80\x02X\x01\x00\x00\x00aQ.",
    "extension 1": b"\x80\x02\x82\x01.",
    "extension 2": b"\x80\x02\x83\x01\x00.",
    "extension 4": b"\x80\x02\x84\x01\x00\x00\x00.",
    "out-of-band buffer": b"\x80\x05\x97.",
    "read-only buffer": b"\x80\x05\x97\x98.",
    "duplicate": b"I1\n2.",
    "a name with a line of its own": "\x80\x04\x8c\x05a\x1b[2J\x8c\x03\n\r\x07\x93.".encode(
        "latin1"
    ),
}


@pytest.mark.parametrize("name", UNSAFE)
def test_unusual_instructions_and_arguments_are_refused(tmp_path, name):
    refused(tmp_path, UNSAFE[name])


def test_numpy_itself_is_unchanged_by_attempts_on_its_dtypes(tmp_path):
    byte_swap = GET_DTYPE + b"(S'f4'\nI00\nI00\ntR(I3\nS'>'\nNNNI-1\nI-1\nI0\ntb."
    assert load_bytes(tmp_path, byte_swap) == np.dtype(">f4")
    assert np.dtype("f4").isnative


# What is broken


BROKEN = {
    "nothing on the stack": b".",
    "text": b"version https://git-lfs.github.com/spec/v1\n",
    "json": b'{"image_encoder.norm.weight": [1]}',
    "html": b"<!DOCTYPE html><html></html>",
    "zip": b"PK\x03\x04" + bytes(40),
    "jpeg": b"\xff\xd8\xff\xe0\x00\x10JFIF" + bytes(40),
    "unknown opcode": b"\x80\x04\xfe.",
    "mark without a use": b"(.",
    "no mark": b"I1\nt.",
    "memo entry that is not there": b"h\x05.",
    "memo of nothing": b"q\x05.",
    "key without a value": b"(I1\nd.",
    "tuple of too few": b"\x80\x02I1\n\x86.",
    "shape larger than the data": GET_ARRAY + b"(I1\n(I9\nt" + FLOAT32 + b"I00\nS'1234'\ntb.",
    "shape smaller than the data": GET_ARRAY + b"(I1\n(I1\nt" + FLOAT32 + b"I00\nS'12345678'\ntb.",
    "negative shape": GET_ARRAY + b"(I1\n(I-1\nt" + FLOAT32 + b"I00\nS'1234'\ntb.",
    "shape of text": GET_ARRAY + b"(I1\n(S'1'\nt" + FLOAT32 + b"I00\nS'1234'\ntb.",
    "shape that overflows": GET_ARRAY
    + b"(I1\n(L4294967296L\nL4294967296L\nI0\nt"
    + FLOAT32
    + b"I00\nS''\ntb.",
    "shape of huge numbers": GET_ARRAY
    + b"(I1\n(L"
    + b"9" * 4000
    + b"L\nI0\nt"
    + FLOAT32
    + b"I00\nS''\ntb.",
    "a hundred dimensions": GET_ARRAY
    + b"(I1\n("
    + b"I1\n" * 100
    + b"t"
    + FLOAT32
    + b"I00\nS'1234'\ntb.",
    "text beyond latin-1": b"c_codecs\nencode\n(V\\u20ac\nVlatin1\ntR.",
    "a number as a name": b"\x80\x04K\x01K\x02\x93.",
    "an integer of too many digits": b"I" + b"9" * 10_000 + b"\n.",
    "bytes longer than the file": b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"abc.",
    "bytes of a negative length": b"\x80\x02\x8b" + struct.pack("<i", -1) + b".",
    "memo index of four billion, then a missing one": b"I1\nr\xff\xff\xff\xffj\xfe\xff\xff\xff.",
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_and_foreign_files_are_reported(tmp_path, name):
    assert "weights.pkl" in rejected(tmp_path, BROKEN[name])


def test_missing_file_folder_and_empty_file_are_reported(tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere\.pkl: No such file"):
        load_pickle(tmp_path / "nowhere.pkl")
    with pytest.raises(CheckpointError, match="directory"):
        load_pickle(tmp_path)
    assert "is empty" in rejected(tmp_path, b"")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_every_truncation_is_reported(tmp_path, protocol):
    whole = pickle.dumps({"weight": np.arange(4.0), "name": ["a", 1]}, protocol)
    for length in range(1, len(whole)):
        with pytest.raises(CheckpointError):
            load_bytes(tmp_path, whole[:length])


@pytest.mark.filterwarnings("ignore:invalid escape sequence")  # of pickletools, on damaged text
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_random_damage_never_leads_to_a_foreign_exception(tmp_path, protocol):
    rng = random.Random(protocol)
    value = {"weight": np.arange(4.0), "half": np.ones((2, 2), "f2").T, "names": ["a", (1, 2.5)]}
    whole = pickle.dumps([value, np.float32(1), OrderedDict(a={1})], protocol)
    for _ in range(500):
        damaged = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        try:
            load_bytes(tmp_path, bytes(damaged))
        except CheckpointError as error:
            assert str(error).isprintable()


# What is meant to exhaust the machine


def test_a_huge_memo_index_costs_nothing(tmp_path):
    assert load_bytes(tmp_path, b"I7\nr\xff\xff\xff\xff.") == 7


def test_deep_nesting_is_built_without_recursion(tmp_path):
    deep = load_bytes(tmp_path, b"\x80\x02)" + b"\x85" * 300_000 + b".")
    for _ in range(300_000):
        (deep,) = deep
    assert deep == ()
    nested = load_bytes(tmp_path, b"(" * 200_000 + b"l" * 200_000 + b".")
    assert type(nested) is list


def test_a_deep_tuple_as_a_key_is_refused_before_it_is_hashed(tmp_path):
    message = refused(tmp_path, b"\x80\x02})" + b"\x85" * 500_000 + b"Ns.")
    assert "a key of type tuple" in message


def test_an_exponential_structure_is_neither_unfolded_nor_printed(tmp_path):
    doubled = b"".join(b"(h%ch%ctq%c" % (i, i, i + 1) for i in range(100))
    assert type(load_bytes(tmp_path, b")q\x00" + doubled + b".")) is tuple
    rejected(tmp_path, b")q\x00" + doubled + b"S'a'\n\x93.")  # as the module of a global name
    refused(tmp_path, b"(" + b")q\x00" + doubled + b"Nd.")  # as a key


def test_too_many_instructions_are_reported(tmp_path):
    assert "instructions" in rejected(tmp_path, b"]" * (MAX_INSTRUCTIONS + 1) + b".")


@pytest.mark.parametrize("kind", ["array", "text"])
def test_data_that_are_copied_over_and_over_are_reported(tmp_path, kind):
    text = b"V" + b"a" * 400_000 + b"\np1\n"
    swapped = FLOAT32.replace(b"'<'", b"'>'") + b"p2\n"
    array = GET_ARRAY + b"(I1\n(I100000\ntg2\nI00\ng1\ntb"
    encode = b"c_codecs\nencode\n(g1\nVlatin1\ntR"
    data = text + swapped + b"(" + (array if kind == "array" else encode) * 20 + b"l."
    assert "more than its own size" in rejected(tmp_path, data)


def test_a_list_that_is_copied_into_set_after_set_is_reported(tmp_path):
    items = b"(" + b"".join(b"I%d\n" % i for i in range(2000)) + b"lp1\n"
    one = b"c__builtin__\nset\n(g1\ntR"
    assert "more than its own size" in rejected(tmp_path, b"(" + items + one * 1000 + b"l.")
    assert load_bytes(tmp_path, b"(" + items + one + b"l.")[1] == set(range(2000))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_honest_sets_of_any_number_load(tmp_path, protocol):
    sets = [{None}, set(range(3000)), {f"{i}" for i in range(300)}, *({i} for i in range(500))]
    assert load_bytes(tmp_path, pickle.dumps(sets, protocol)) == sets


COLLIDING = 2**61 - 1  # Python hashes integers modulo this


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("key", [COLLIDING, -COLLIDING, 2**60, -(2**60), 5 * COLLIDING, 10**40])
def test_integers_that_can_be_made_to_collide_are_no_keys(tmp_path, key, protocol):
    for content in ({key: None}, {key}, [{1: {key: 2}}], OrderedDict({key: 1})):
        assert "61 bits" in refused(tmp_path, pickle.dumps(content, protocol))
    assert load_bytes(tmp_path, pickle.dumps([key], protocol)) == [key]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_ordinary_keys_load(tmp_path, protocol):
    keys = [0, -7, 2**60 - 1, 1 - 2**60, True, None, 2.5, 1e300, float(COLLIDING), "a", b"a"]
    content = [dict.fromkeys(keys), set(keys)]
    assert load_bytes(tmp_path, pickle.dumps(content, protocol)) == content


def test_a_dict_of_colliding_integers_is_refused_at_the_first(tmp_path):
    content = pickle.dumps({i * COLLIDING: None for i in range(100)})
    assert "61 bits" in refused(tmp_path, content)


@pytest.mark.parametrize("part", ["shape", "axes"])
def test_a_long_tuple_in_place_of_a_shape_is_rejected_unread(tmp_path, part):
    class Unread(tuple):
        def __iter__(self):
            raise AssertionError("a long tuple may be used again and again")

    constructors = Constructors(100)
    long = Unread([0] * 100)
    arguments = (b"", np.dtype("f4"), long if part == "shape" else (0,))
    order = ("C",) if part == "shape" else ("K", long)
    with pytest.raises(ValueError, match="impossible"):
        constructors.call(Symbol.FROM_BUFFER, (*arguments, *order))


def test_the_pickler_of_the_standard_library_reads_what_is_read_here(tmp_path):
    # Both unpicklers must agree on plain pickles.
    rng = random.Random(0)

    def value(depth: int) -> object:
        kinds = [
            lambda: rng.randint(-(2**70), 2**70),
            rng.random,
            lambda: "é" * rng.randint(0, 300),
        ]
        kinds += [lambda: bytes(rng.randbytes(rng.randint(0, 300))), lambda: None, lambda: True]
        if depth:
            kinds += [
                lambda: [value(depth - 1) for _ in range(rng.randint(0, 5))],
                lambda: tuple(value(depth - 1) for _ in range(rng.randint(0, 5))),
                lambda: {str(i): value(depth - 1) for i in range(rng.randint(0, 5))},
            ] * 2
        return rng.choice(kinds)()

    for i in range(300):
        buffer = io.BytesIO()
        pickle.Pickler(buffer, i % 6).dump(value(4))
        assert load_bytes(tmp_path, buffer.getvalue()) == pickle.loads(buffer.getvalue())
