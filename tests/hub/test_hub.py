"""Sharing adapters: what is sent, what never is, and what happens when the Hub or the connection fails."""

import functools
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import time
import traceback
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from conftest import GOLDEN, edit_adapter, load_samed_weights
from hub_server import FORBIDDEN, TOKEN, UNKNOWN, Hub
from huggingface_hub import constants
from PIL import Image, PngImagePlugin
from safetensors.torch import load_file, save_file

from samed_peft.adapters.folder import ADAPTER_FILES
from samed_peft.adapters.places import without_places
from samed_peft.adapters.save_load import add_lora, load_adapter, save_adapter, write_card
from samed_peft.cli import main
from samed_peft.config import SYNAPSE_CLASSES, TINY_SAM, SamedConfig
from samed_peft.errors import InputError
from samed_peft.evaluation import Report, evaluate_cases, write_report
from samed_peft.hub.content import published_files
from samed_peft.hub.push import push_to_hub, send_files
from samed_peft.models.bases import load_sam, recorded_base

# huggingface_hub 2.4 hands files to httpx2 by a name that is on its way out.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

REPO = "someone/liver"
CASES = ("patient-0042", "patient-0043")
FILES = {"weights.safetensors": b"w" * 3000, "README.md": b"# card", "samed_config.json": b"{}"}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A server on this machine in the Hub's place, with an empty cache and somebody logged in."""
    with Hub() as server:
        for name, value in (
            ("ENDPOINT", server.endpoint),
            ("HUGGINGFACE_CO_URL_TEMPLATE", server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"),
            ("HF_HUB_CACHE", str(tmp_path / "cache")),
            ("HF_TOKEN_PATH", str(tmp_path / "no-token")),
            ("HF_HUB_OFFLINE", False),
            ("HF_HUB_DISABLE_XET", True),
        ):
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        huggingface_hub.close_session()
        yield server
        huggingface_hub.close_session()


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run as the recipes leave it: an adapter of a base on this disk, its report and pictures."""
    folder = tmp_path_factory.mktemp("home") / "John Doe" / "runs"
    shutil.copy(GOLDEN / "sam_base.pth", folder.parent.parent / "sam_base.pth")
    base = recorded_base(str(folder.parent.parent / "sam_base.pth"))
    config = SamedConfig(base=base, class_names=SYNAPSE_CLASSES, image_size=128, input_size=56, rank=4)
    torch.manual_seed(7)
    model = add_lora(load_sam(base, class_names=SYNAPSE_CLASSES, image_size=128), config)
    load_samed_weights(model, GOLDEN / "samed_adapter.pth")
    save_adapter(model, folder / "adapter", config=config)
    labels = np.random.default_rng(0).integers(0, 9, (3, 16, 16), dtype=np.uint8)
    volumes = dict.fromkeys(CASES, labels)
    images = dict.fromkeys(CASES, labels.astype(np.float32))
    settings = {"dataset": "/srv/scans/hospital", "base": base, "failed_cases": {"patient-0044": f"{folder}/x: bad"}}
    report = evaluate_cases(volumes, volumes, class_names=SYNAPSE_CLASSES, images=images, settings=settings)
    write_report(report, folder)
    write_card(folder / "adapter", report=report)
    return folder


@pytest.fixture
def adapter(run_folder, tmp_path):
    """A copy of the run's adapter, with the report around it."""
    shutil.copytree(run_folder, tmp_path / "run")
    return tmp_path / "run" / "adapter"


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def content_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def commits(server, repo=REPO):
    """Files after each commit but the Hub's own."""
    return server.repositories[repo].commits[1:]


# What is sent


def test_a_push_is_one_commit_of_the_adapter_and_its_scores(hub, adapter):
    (adapter / "optimizer.safetensors").write_text("not for strangers")
    (adapter / "checkpoint").mkdir()
    (adapter / "checkpoint" / "adapter_config.json").write_text("nor this")
    before = content_of(adapter.parent)
    assert push_to_hub(adapter, REPO) == f"{hub.endpoint}/{REPO}"
    (files,) = commits(hub)
    assert set(files) == {*ADAPTER_FILES, "report.json", "report.md"}
    assert files["adapter_model.safetensors"] == (adapter / "adapter_model.safetensors").read_bytes()
    assert not hub.repositories[REPO].private
    assert content_of(adapter.parent) == before


def test_an_adapter_that_says_nothing_of_this_machine_is_sent_byte_for_byte(hub, adapter):
    edit_adapter(adapter, base="facebook/sam-vit-base")
    edit_adapter(adapter, "adapter_config.json", base_model_name_or_path="facebook/sam-vit-base")
    push_to_hub(adapter, REPO)
    (files,) = commits(hub)
    assert {name: files[name] for name in ADAPTER_FILES} == {n: (adapter / n).read_bytes() for n in ADAPTER_FILES}


def test_an_adapter_of_its_own_has_four_files(hub, adapter, tmp_path):
    shutil.move(adapter, tmp_path / "alone")
    push_to_hub(tmp_path / "alone", REPO)
    assert set(commits(hub)[0]) == set(ADAPTER_FILES)


def test_the_report_of_another_adapter_is_not_sent(adapter):
    last = adapter.with_name("last")
    shutil.copytree(adapter, last)
    write_card(last)  # this one was not tested
    assert set(published_files(last)) == set(ADAPTER_FILES)
    report = json.loads((adapter.parent / "report.json").read_text())
    report["standard"]["classes"] = {"heart": {}}
    (adapter.parent / "report.json").write_text(json.dumps(report))
    assert set(published_files(adapter)) == set(ADAPTER_FILES)


def test_a_push_may_be_repeated(hub, adapter):
    assert push_to_hub(adapter, REPO) == push_to_hub(adapter, REPO)
    assert len(commits(hub)) == 1
    assert hub.count("upload") == 1


def test_private_repositories(hub, adapter):
    push_to_hub(adapter, REPO, private=True)
    push_to_hub(adapter, REPO, private=True)
    push_to_hub(adapter, REPO)  # and one that exists stays as it is
    assert hub.repositories[REPO].private
    assert len(commits(hub)) == 1


def test_what_is_to_be_private_is_not_sent_to_a_public_repository(hub):
    send_files(FILES, REPO)
    with pytest.raises(InputError, match=r"expected a private repository, but someone/liver exists and is public"):
        send_files({"README.md": b"secret"}, REPO, private=True)
    assert commits(hub) == [FILES]


@pytest.mark.parametrize("name", ADAPTER_FILES)
@pytest.mark.parametrize("damage", ["missing", "empty"])
def test_an_incomplete_adapter_is_not_sent(hub, adapter, name, damage):
    (adapter / name).unlink()
    if damage == "empty":
        (adapter / name).touch()
    with pytest.raises(InputError, match=f"missing or empty: {name}"):
        push_to_hub(adapter, REPO)
    assert hub.requests == []


@pytest.mark.parametrize("content", [b"PK\x03\x04 a pickle in a zip", b"\x80\x02}q\x00."])
def test_weights_that_are_no_safetensors_are_not_sent(hub, adapter, content):
    (adapter / "adapter_model.safetensors").write_bytes(content)
    with pytest.raises(InputError, match="expected a safetensors file"):
        push_to_hub(adapter, REPO)
    assert hub.requests == []


@pytest.mark.parametrize("repo_id", ["a/b/c", "someone/", "", "someone/liver tumour", "someone/liver.git"])
def test_a_malformed_repository_is_refused(hub, repo_id):
    with pytest.raises(InputError, match="expected owner/name"):
        send_files(FILES, repo_id)
    assert hub.requests == []


def test_a_folder_that_is_not_there_is_refused(hub, tmp_path):
    with pytest.raises(InputError, match="nowhere"):
        push_to_hub(tmp_path / "nowhere", REPO)
    assert hub.requests == []


# What is not sent


def test_no_places_and_no_cases_leave_the_machine(adapter, run_folder):
    card = adapter / "README.md"
    mine = f"\nTrained in {run_folder} on /mnt/scans/patient-0043/ct.nii, C:\\scans\\a.nii and file:///srv/x.\n"
    card.write_text(card.read_text() + mine + "patient-0042 is hard.\n")
    weights = adapter / "adapter_model.safetensors"
    save_file(load_file(weights), weights, metadata={"format": "pt", "made_from": "/home/jdoe/patient-0042"})
    edit_adapter(adapter)
    files = published_files(adapter, pictures=True)
    everything = b"\n".join(files.values()) + repr(list(files)).encode()
    for secret in ("home/", "John Doe", "jdoe", "/mnt", "scans\\", "/srv", "hospital/", "patient-00", "bad"):
        assert secret.encode() not in everything, secret
    assert b"Trained in runs on ct.nii, a.nii and x." in files["README.md"]
    for name in ("samed_config.json", "adapter_config.json"):
        assert b"sam_base.pth" in files[name]
    config = json.loads(files["samed_config.json"])
    assert config.pop("checksums")["adapter_config.json"] == hashlib.sha256(files["adapter_config.json"]).hexdigest()
    assert config == json.loads((adapter / "samed_config.json").read_text()) | {"base": "sam_base.pth"}
    assert config["base_sha256"] is not None


def test_names_of_cases_are_found_in_markdown_that_escapes_them(adapter):
    path = adapter.parent / "report.json"
    text = path.read_text()
    path.write_text(text.replace("patient-0042", "patient[0042]`a|b"))
    card = adapter / "README.md"
    card.write_text(card.read_text() + "| test_cases | \\['patient\\[0042\\]\\`a\\|b'\\] |\n")
    assert b"0042" not in published_files(adapter)["README.md"]
    assert b"(left out)" in published_files(adapter)["README.md"]


def test_scores_are_sent_as_means_over_cases(adapter):
    files = published_files(adapter)
    local, report = json.loads((adapter.parent / "report.json").read_text()), json.loads(files["report.json"])
    for convention in ("standard", "samed"):
        assert report[convention] == local[convention]
    assert (report["cases"], report["n_cases"]) == ([], 2)
    assert report["settings"] == {"surface_dice_tolerance_mm": 2.0, "dataset": "hospital"}
    assert "2 cases of hospital." in files["report.md"].decode()
    assert "| liver | 1.0000 |" in files["report.md"].decode()
    assert Report.from_dict(report).to_dict() == report


def test_cases_are_sent_on_demand_and_places_never(adapter):
    files = published_files(adapter, cases=True, pictures=True)
    report = json.loads(files["report.json"])
    assert [row["case"] for row in report["cases"]] == list(CASES)
    assert report["settings"]["failed_cases"] == {"patient-0044": "left out"}
    assert "| patient-0042 | liver | 1.0000 |" in files["report.md"].decode()
    assert {f"pictures/{case}.png" for case in CASES} <= set(files)
    everything = b"\n".join(files.values())
    for secret in (b"John Doe", b"/srv", b"home/"):
        assert secret not in everything


def test_of_a_report_only_figures_are_sent(adapter):
    path = adapter.parent / "report.json"
    report = json.loads(path.read_text())
    report["standard"]["classes"]["liver"] |= {"worst": "patient-0042", "worst_two": ["patient-0042", 0.5]}
    report["standard"]["notes"] = "patient-0042"
    path.write_text(json.dumps(report))
    assert b"patient" not in published_files(adapter)["report.json"]


@pytest.mark.parametrize("changes", [{"cases": [1]}, {"samed": {"mean": 1}}, {"standard": {"classes": {"liver": 1}}}])
def test_a_report_that_is_none_is_not_sent_in_parts(adapter, changes):
    edit_json(adapter.parent / "report.json", **changes)
    if "standard" in changes:
        edit_adapter(adapter, class_names=["liver"])
    with pytest.raises(InputError, match=r"expected a report of this package in .*report\.json, found another"):
        published_files(adapter, cases=True)


def test_pictures_have_pixels_and_numbers_only(adapter):
    folder = adapter.parent / "pictures"
    note = PngImagePlugin.PngInfo()
    note.add_text("Comment", "patient-0042 of /home/jdoe")
    with Image.open(folder / "patient-0042.png") as picture:
        pixels = np.asarray(picture)
    Image.fromarray(pixels).save(folder / "patient-0042.png", pnginfo=note)
    (folder / "notes.txt").write_text("patient-0042")
    before = content_of(folder)
    files = published_files(adapter, pictures=True)
    assert sorted(n for n in files if n.startswith("pictures/")) == ["pictures/case-001.png", "pictures/case-002.png"]
    sent = Image.open(io.BytesIO(files["pictures/case-001.png"]))
    np.testing.assert_array_equal(np.asarray(sent), pixels)
    assert sent.info.keys() <= {"transparency"}
    assert b"jdoe" in before[Path("patient-0042.png")]
    assert content_of(folder) == before


@pytest.mark.parametrize("damage", ["no PNG", "cut", "no end", "other checksum", "none"])
def test_pictures_that_are_none_are_refused(adapter, damage):
    folder = adapter.parent / "pictures"
    data = (folder / "patient-0042.png").read_bytes()
    if damage == "none":
        shutil.rmtree(folder)
    else:
        middle = len(data) // 2
        other = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        damaged = {"no PNG": b"GIF89a", "cut": data[:middle], "no end": data[:-3], "other checksum": other}
        (folder / "patient-0042.png").write_bytes(damaged[damage])
    with pytest.raises(InputError, match="found none; leave pictures out" if damage == "none" else "expected a PNG in"):
        published_files(adapter, pictures=True)


def test_the_tiny_sam_and_its_note_are_named(adapter):
    edit_adapter(adapter, base=TINY_SAM)
    files = published_files(adapter)
    assert json.loads(files["samed_config.json"])["base"] == TINY_SAM
    assert b"The base is not SAM" in files["report.md"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("see /home/a/b.nii.gz, then", "see b.nii.gz, then"),
        ("`/data/x`|~/y/z|C:\\Users\\a|\\\\host\\share\\c", "`x`|z|a|c"),
        ("file:///home/a/b", "b"),
        ("https://huggingface.co/a/b and/or 3/4, n/a, Dice / HD95, </p>, <br/>, name/repo", None),
        ("jdoe@gpu03.example.org:/data/a.nii, host:/data/b.nii", "a.nii, host:b.nii"),
        ("smb://server/share/a.nii from=/data/b.nii", "a.nii from=b.nii"),
        ("in /my own/place with blanks", "in place with blanks"),
        ("in /mnt/John Q Public/scans/a.nii it is", "in a.nii it is"),
        ("on //nas01/patients/smith/ct and /Übung/Müller/ct", "on ct and ct"),
        ("/@snap/smith/a, $HOME/smith/b, in Bögen/Kästen or m/s", "a, b, in Bögen/Kästen or m/s"),
    ],
)
def test_places_in_running_text(text, expected):
    assert without_places(text, ["/my own/place"]) == (text if expected is None else expected)


# When the Hub refuses


@pytest.mark.parametrize(
    ("repo_id", "token", "message"),
    [
        (REPO, "hf_wrongButSecret", r"does not accept the token for someone/liver \(401: .*hf auth login"),
        (f"{FORBIDDEN}/liver", TOKEN, r"may not write to others/liver \(403: You don't have the rights"),
        (f"{UNKNOWN}/liver", TOKEN, r"does not know nobody/liver or its owner \(404"),
        (REPO, "hf_broken token", "has blanks or other characters"),
        (REPO, "hf_brökenToken", "has blanks or other characters"),
        (REPO, "", "expected a token for the Hub, found none; run hf auth login, or set HF_TOKEN"),
    ],
)
def test_refusals_say_what_to_do_and_hide_the_token(hub, capfd, caplog, repo_id, token, message):
    with pytest.raises(InputError, match=message) as caught:
        send_files(FILES, repo_id, token=token)
    shown = "".join([*traceback.format_exception(caught.value), caplog.text, *capfd.readouterr()])
    assert not token or token not in shown
    assert hub.count("create") <= 1
    assert hub.count("commit") == 0


def test_tokens_come_from_the_usual_places(hub, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(InputError, match="expected a token"):
        send_files(FILES, REPO)
    (tmp_path / "no-token").write_text(TOKEN)  # where `hf auth login` leaves it
    send_files(FILES, REPO)
    assert commits(hub) == [FILES]


def test_offline_mode_is_respected(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="HF_HUB_OFFLINE is set"):
        send_files(FILES, REPO)
    assert hub.requests == []


# When the connection fails


@pytest.mark.parametrize("kind", ["create", "validate", "commit"])
@pytest.mark.parametrize("fault", [429, 500, 503, "drop", "lose", "cut"])
def test_a_request_that_fails_once_is_repeated(hub, caplog, kind, fault):
    hub.faults[kind] = [fault]
    send_files(FILES, REPO, waits_s=(0, 0))
    assert commits(hub) == [FILES]
    assert f"the Hub {'answered ' if isinstance(fault, int) else 'did not answer'}" in caplog.text


@pytest.mark.parametrize("kind", ["preupload", "batch", "upload"])
@pytest.mark.parametrize("fault", [429, "drop"])
def test_an_upload_that_fails_once_is_repeated(hub, caplog, kind, fault):
    hub.faults[kind] = [fault]
    send_files(FILES, REPO)
    assert commits(hub) == [FILES]
    assert "secret" not in caplog.text  # the signature of the address that takes the file


@pytest.mark.parametrize("kind", ["create", "validate", "commit"])
def test_a_hub_that_stays_down_is_named_after_a_few_tries(hub, kind):
    hub.faults[kind] = [500] * 9
    with pytest.raises(InputError, match=r"did not take the adapter for someone/liver \(500: no luck\) in several"):
        send_files(FILES, REPO, waits_s=(0, 0))
    assert hub.count(kind) == 3
    hub.faults.clear()
    send_files(FILES, REPO)  # the interrupted push, repeated
    assert commits(hub) == [FILES]
    assert hub.count("upload") == 1


def test_a_busy_hub_is_given_the_time_it_asks_for(hub, caplog):
    hub.retry_after = "1"
    hub.faults["commit"] = [429]
    send_files(FILES, REPO, waits_s=(0,))
    assert "answered 429; trying again in 1 s" in caplog.text


def test_a_commit_whose_answers_are_lost_is_made_once(hub):
    hub.faults["commit"] = ["lose"]
    send_files(FILES, REPO, waits_s=(0,))
    assert len(commits(hub)) == 1
    assert hub.count("commit") == 1


@pytest.mark.parametrize("status", [400, 409, 413])
def test_refusals_of_a_commit_are_not_repeated(hub, status):
    hub.faults["commit"] = [status]
    with pytest.raises(InputError, match=rf"refused the adapter for someone/liver \({status}: no luck\)"):
        send_files(FILES, REPO, waits_s=(0, 0))
    assert hub.count("commit") == 1


def test_a_refused_upload_is_no_commit(hub):
    hub.faults["upload"] = [400]
    with pytest.raises(InputError, match=r"refused the adapter for someone/liver \(400: no luck\)"):
        send_files(FILES, REPO)
    assert commits(hub) == []
    send_files(FILES, REPO)
    assert commits(hub) == [FILES]


def test_an_upload_that_never_succeeds_ends(hub, monkeypatch):
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.05)))
    hub.faults["upload"] = [503] * 99
    with pytest.raises(InputError, match=r"did not take the adapter for someone/liver \(503: no luck\)"):
        send_files(FILES, REPO)
    assert hub.count("upload") == 6  # huggingface_hub's own patience


def test_no_connection_at_all(hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(InputError, match=r"http://127.0.0.1:9 cannot be reached \(ConnectError\); check your conn"):
        send_files(FILES, REPO)


def test_a_server_that_is_no_hub(hub):
    hub.faults["create"] = ["short"]
    with pytest.raises(InputError, match="does not answer as a Hub does; check HF_ENDPOINT"):
        send_files(FILES, REPO, waits_s=())


# Fetching


@pytest.fixture
def pushed(hub, adapter):
    """A repository with two adapters, the second of another rank of precision; and the commit of the first."""
    push_to_hub(adapter, REPO)
    first = hub.repositories[REPO].oid()
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file({k: v * 2 for k, v in weights.items()}, adapter / "adapter_model.safetensors", {"format": "pt"})
    edit_adapter(adapter)
    push_to_hub(adapter, REPO)
    return first


def some_weight(model):
    return next(p for n, p in model.named_parameters() if "lora_B" in n).detach()


def test_an_adapter_comes_back_by_its_name_and_revision(hub, pushed, run_folder):
    base = str(GOLDEN / "sam_base.pth")
    first = load_adapter(REPO, base=base, revision=pushed)
    assert some_weight(first).equal(some_weight(load_adapter(run_folder / "adapter")))
    assert some_weight(load_adapter(REPO, base=base)).equal(2 * some_weight(first))
    with pytest.raises(InputError, match=r"at revision v9 cannot be fetched .* has no such revision"):
        load_adapter(REPO, base=base, revision="v9")


def test_the_receiver_is_told_to_name_the_base(hub, adapter, monkeypatch, tmp_path):
    push_to_hub(adapter, REPO)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"sam_base\.pth is neither .*; .* records it: .* base, or --base"):
        load_adapter(REPO)


def test_a_private_adapter_is_fetched_with_the_token_alone(hub, adapter, monkeypatch):
    push_to_hub(adapter, REPO, private=True)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(InputError, match="it does not exist or is private; check its name, and your token"):
        load_adapter(REPO)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    load_adapter(REPO, base=str(GOLDEN / "sam_base.pth"))


def test_cve_2026_21851_files_of_the_hub_stay_in_their_folder(hub, adapter, tmp_path):
    push_to_hub(adapter, REPO)
    slipped = ("../slipped.json", "../../../../adapter_config.json", f"{tmp_path}/slipped.json", "a/../../report.json")
    hub.repositories[REPO].commits.append(commits(hub)[0] | dict.fromkeys(slipped, b"{}"))
    before = content_of(tmp_path)
    load_adapter(REPO, base=str(GOLDEN / "sam_base.pth"))
    new = {str(path) for path in content_of(tmp_path).keys() - before.keys()}
    assert new
    assert all(path.startswith("cache/") and "slipped" not in path for path in new)
    assert not any("slipped" in path or ".." in path for _, path in hub.requests)


def test_an_adapter_that_is_not_there(hub):
    with pytest.raises(
        InputError, match="someone/nothing cannot be fetched from the Hub: it does not exist or is private"
    ):
        load_adapter("someone/nothing")


def test_a_folder_has_no_revisions(adapter):
    with pytest.raises(InputError, match="expected no revision for the folder"):
        load_adapter(adapter, revision="main")


@pytest.mark.parametrize("way", ["HF_HUB_OFFLINE", "no connection", "Hub down"])
def test_without_the_hub_the_cache_serves(hub, pushed, monkeypatch, way):
    base = str(GOLDEN / "sam_base.pth")
    expected = {revision: some_weight(load_adapter(REPO, base=base, revision=revision)) for revision in (None, pushed)}
    if way == "HF_HUB_OFFLINE":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    elif way == "no connection":
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    else:
        hub.faults |= {kind: [500] * 99 for kind in ("info", "tree", "head", "download")}
    for revision, weight in expected.items():
        assert some_weight(load_adapter(REPO, base=base, revision=revision)).equal(weight)
    with pytest.raises(InputError, match="someone/other cannot be fetched from the Hub"):
        load_adapter("someone/other")


@pytest.mark.parametrize("fault", ["cut", "short"])
def test_a_download_that_breaks_off_leaves_no_half_adapter(hub, pushed, fault):
    hub.faults["download"] = [fault] * 4  # "cut" is gone on with, "short" refused
    base = str(GOLDEN / "sam_base.pth")
    if fault == "short":
        with pytest.raises(InputError, match="cannot be fetched from the Hub: Consistency check failed"):
            load_adapter(REPO, base=base)
        hub.faults.clear()
    load_adapter(REPO, base=base)


def test_a_download_that_never_ends_well(hub, pushed):
    hub.faults["download"] = [500] * 99
    with pytest.raises(InputError, match="someone/liver cannot be fetched from the Hub"):
        load_adapter(REPO)


# As programs, with everything from the environment


PEFT_ONLY = """
import sys
import torch
from peft import PeftModel
from samed_peft import load_adapter, load_sam
from samed_peft.config import SYNAPSE_CLASSES
base, folder, repo = sys.argv[1:]
x = torch.rand(1, 3, 128, 128)
mine = load_adapter(folder)(pixel_values=x).logits
for source in (folder, repo):
    sam = load_sam(base, class_names=SYNAPSE_CLASSES, image_size=128)
    assert PeftModel.from_pretrained(sam, source).eval()(pixel_values=x).logits.equal(mine)
"""


def run_program(server, home, *arguments, **changes):
    """A new Python that takes the server for the Hub, with everything it knows from the environment."""
    environment = os.environ | {
        **{"HF_ENDPOINT": server.endpoint, "HF_HOME": str(home / "home"), "HF_TOKEN": TOKEN},
        **{"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "ACCELERATE_USE_CPU": "true"},
        **changes,
    }
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, env=environment, cwd=home, capture_output=True, encoding="utf-8", timeout=240)


@pytest.mark.slow
def test_a_recipe_pushes_its_adapter_and_names_no_case(hub, tmp_path):
    for case in range(4):
        picture = np.random.default_rng(case).integers(0, 255, (32, 32), dtype=np.uint8)
        for kind, pixels in (("images", picture), ("masks", (picture > 128).astype(np.uint8))):
            (tmp_path / "jdoe" / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(tmp_path / "jdoe" / kind / f"patient-004{case}.png")
    options = ["--data_dir", "jdoe", "--class_names", "ball", "--test_cases", "patient-0041", "--output_dir", "out"]
    options += ["--base", "tiny-sam", "--image_size", "64", "--epochs", "1", "--batch_size", "3", "--num_workers", "0"]
    recipe = Path(__file__).parents[2] / "recipes" / "finetune.py"
    done = run_program(hub, tmp_path, recipe, *options, "--push_to_hub", REPO)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(f"{hub.endpoint}/{REPO}\n")
    (files,) = commits(hub)
    assert set(files) == {*ADAPTER_FILES, "report.json", "report.md"}
    everything = b"\n".join(files.values())
    for secret in (b"patient", b"jdoe", str(tmp_path).encode()):
        assert secret not in everything
    assert json.loads(files["report.json"])["n_cases"] == 1


@pytest.mark.slow
def test_push_predict_and_stock_peft_as_programs(hub, adapter, tmp_path):
    np.savez(tmp_path / "scan.npz", image=np.random.default_rng(1).random((64, 64), dtype=np.float32))
    base = str(GOLDEN / "sam_base.pth")

    python = functools.partial(run_program, hub, tmp_path)
    before = content_of(adapter.parent)
    sent = python("-m", "samed_peft", "push", adapter, REPO, "--private", "--pictures")
    assert sent.returncode == 0, sent.stderr
    assert sent.stdout.startswith(f"sent to {hub.endpoint}/{REPO}: adapter_model.safetensors, ")
    assert len(commits(hub)) == 1
    assert hub.repositories[REPO].private
    assert content_of(adapter.parent) == before
    refused = python("-m", "samed_peft", "push", adapter, REPO, HF_TOKEN="hf_wrongButSecret")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.startswith("error: the Hub does not accept the token")
    assert "hf_wrongButSecret" not in refused.stderr

    predict = ("-m", "samed_peft", "predict", "--adapter", REPO, "--input", "scan.npz", "--base", base)
    revision = hub.repositories[REPO].oid()
    for name, changes in (("online", {}), ("offline", {"HF_HUB_OFFLINE": "1"})):
        done = python(*predict, "--revision", revision, "--output", f"{name}.nii.gz", **changes)
        assert done.returncode == 0, done.stderr
    digests = {hashlib.sha256((tmp_path / f"{name}.nii.gz").read_bytes()).digest() for name in ("online", "offline")}
    assert len(digests) == 1
    assert python(*predict, "--revision", "v9", "--output", "x.nii.gz").returncode == 2
    stock = python("-c", PEFT_ONLY, base, adapter, REPO)
    assert stock.returncode == 0, stock.stderr


def test_the_command_line(hub, adapter, capsys, monkeypatch):
    main(["push", str(adapter), REPO, "--private", "--pictures", "--cases"])
    names = [*ADAPTER_FILES, "report.json", "report.md", *(f"pictures/{case}.png" for case in CASES)]
    assert capsys.readouterr().out == f"sent to {hub.endpoint}/{REPO}: {', '.join(names)}\n"
    assert set(commits(hub)[0]) == set(names)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    for repo_id, message in (
        (REPO, "cannot be reached"),
        ("a/b/c", "expected owner/name as repository, found 'a/b/c'"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["push", str(adapter), repo_id])
        assert ended.value.code == 2
        assert message in capsys.readouterr().err


def test_help_of_push_comes_at_once():
    code = (
        "import sys, samed_peft.cli\n"
        "try: samed_peft.cli.main(['push', '--help'])\n"
        "finally: print(*({'torch', 'huggingface_hub', 'peft'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0
    assert "--private" in done.stdout
    assert done.stderr.strip() == ""


@pytest.mark.parametrize(
    "name", ["README.md", "adapter_config.json", "adapter_model.safetensors", "samed_config.json", "../report.json"]
)
def test_links_are_not_followed(adapter, tmp_path, name):
    (adapter / name).replace(tmp_path / "elsewhere")
    (adapter / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=r"expected a file of its own, found a link at .*put a copy there"):
        published_files(adapter)


def test_linked_pictures_are_not_followed(adapter, tmp_path):
    (adapter.parent / "pictures").rename(tmp_path / "elsewhere")
    (adapter.parent / "pictures").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="found a link at"):
        published_files(adapter, pictures=True)
