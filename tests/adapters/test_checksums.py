"""Adapters whose files were damaged or edited, and readers beside a writer that replaces them."""

import contextlib
import json
import threading

import pytest
from conftest import GOLDEN, edit_adapter

from samed_peft.adapters.folder import CONFIG_FILE, PEFT_FILE, WEIGHTS_FILE, read_config
from samed_peft.adapters.info import adapter_info
from samed_peft.adapters.save_load import load_adapter, save_adapter, write_card
from samed_peft.config import SYNAPSE_CLASSES
from samed_peft.conversion import export_merged
from samed_peft.errors import InputError
from samed_peft.hub.content import published_files
from samed_peft.models.bases import load_sam


@pytest.fixture
def saved(golden_model, golden_config, tmp_path):
    save_adapter(golden_model, tmp_path / "adapter", config=golden_config)
    return tmp_path / "adapter"


def flip(path, at, bit=0):
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)


READERS = [load_adapter, adapter_info, published_files, lambda folder: export_merged(folder, folder.parent / "sam")]


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("name", [WEIGHTS_FILE, PEFT_FILE, CONFIG_FILE])
def test_a_flipped_bit_is_noticed(saved, name, read):
    size = (saved / name).stat().st_size
    text = (saved / name).read_bytes()
    after = {WEIGHTS_FILE: b"", PEFT_FILE: b'"lora_alpha": ', CONFIG_FILE: b'"input_size": '}[name]
    flip(saved / name, text.index(after) + len(after) if after else size - 7)  # alpha 4 -> 5, input 56 -> 46
    with pytest.raises(InputError, match=rf"{name} as it was saved, .*damaged.*remove the entry checksums from .*json"):
        read(saved)


def test_no_flipped_bit_of_the_config_is_believed(saved):
    whole, content = read_config(saved), (saved / CONFIG_FILE).read_bytes()
    for at in range(0, len(content), 7):
        flip(saved / CONFIG_FILE, at, bit=at % 7)
        with contextlib.suppress(InputError):
            assert read_config(saved) == whole  # the bit is in white space, or in a checksum of another file
        (saved / CONFIG_FILE).write_bytes(content)


@pytest.mark.parametrize(
    "entry",
    [5, {}, [], {"samed_config.json": "0" * 64}, {"samed_config.json": 3}, None, {"../x": "0" * 64}],
)
def test_an_entry_of_something_else_is_damage(saved, entry):
    values = json.loads((saved / CONFIG_FILE).read_text()) | {"checksums": entry}
    (saved / CONFIG_FILE).write_text(json.dumps(values))
    with pytest.raises(InputError, match=r"samed_config\.json .*remove the entry checksums"):
        load_adapter(saved)


def test_adapters_without_the_entry_load_as_before(saved):
    edit_adapter(saved)
    assert "checksums" not in json.loads((saved / CONFIG_FILE).read_text())
    assert load_adapter(saved) is not None


def test_the_entry_is_no_field_of_the_config(saved, golden_config):
    assert set(json.loads((saved / CONFIG_FILE).read_text())) == {*golden_config.to_dict(), "checksums"}
    assert not hasattr(read_config(saved), "checksums")
    assert "checksums" not in adapter_info(saved)["config"]


def test_a_new_card_and_spaces_in_the_config_change_no_checksum(saved):
    write_card(saved)
    values = json.loads((saved / CONFIG_FILE).read_text())
    (saved / CONFIG_FILE).write_text(json.dumps(dict(reversed(values.items())), indent=7))
    assert load_adapter(saved) is not None


def test_what_is_published_has_checksums_of_its_own(saved, tmp_path):
    files = published_files(saved)
    assert json.loads(files[CONFIG_FILE])["base"] == "sam_base.pth"  # a place of this machine before
    folder = tmp_path / "fetched"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    assert load_adapter(folder, base=str(GOLDEN / "sam_base.pth")) is not None
    flip(folder / WEIGHTS_FILE, -9)
    with pytest.raises(InputError, match="as it was saved"):
        load_adapter(folder, base=str(GOLDEN / "sam_base.pth"))


def test_stock_peft_opens_the_folder(saved, golden_config):
    from peft import PeftModel

    base = load_sam(golden_config.base, class_names=SYNAPSE_CLASSES, image_size=128)
    assert PeftModel.from_pretrained(base, saved) is not None


def test_readers_beside_a_writer_see_one_version(golden_model, golden_config, tmp_path):
    folder = tmp_path / "adapter"
    save_adapter(golden_model, folder, config=golden_config)
    done = threading.Event()

    def replace():
        dtypes = ["float16", "float32"]
        while not done.is_set():
            save_adapter(golden_model, folder, config=golden_config, dtype=dtypes[0])
            dtypes.reverse()

    writer = threading.Thread(target=replace)
    writer.start()
    try:
        sizes = set()
        while len(sizes) < 2:  # until the writer has replaced the folder; pytest's limit of time ends a hang
            sizes.add(adapter_info(folder)["files"][WEIGHTS_FILE])
        for _ in range(4):
            assert len(published_files(folder)) >= 4
        for _ in range(2):
            load_adapter(folder)
    finally:
        done.set()
        writer.join()
