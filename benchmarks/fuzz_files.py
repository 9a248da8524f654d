"""Targets that read files and flags: configs, prompts, adapters, checkpoints."""

import hashlib
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.fuzz_inputs import ROOT, TEXTS, FindingError, Target, as_json, bent, damaged, odd
from rlr_peft.config import DESCRIPTION, NoFlags, config_to_dict, knobs, load_config, read_words, save_config
from rlr_peft.lora import (
    adapter_loaded,
    attach_lora,
    check_adapter,
    export_adapter,
    find_adapter,
    lora_parameters,
    save_lora,
    unload_lora,
)
from rlr_peft.prompts import Columns, load_prompts
from rlr_peft.training import MANIFEST_NAME, CheckpointManager, read_manifest


class Configs(Target):
    """Flags and YAML files."""

    name = "configs"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.files = [path.read_bytes() for path in sorted((ROOT / "configs").glob("*.yaml"))]
        self.file = folder / "config.yaml"
        (folder / "configs").symlink_to(ROOT / "configs")  # they name prompts there

    def attempt(self, chance: random.Random) -> bool:
        content = chance.choice(self.files)
        values = yaml.safe_load(content)
        for _ in range(chance.choice([0, 1, 1, 3])):
            values[chance.choice(list(knobs()))] = self._value(chance)
        if chance.random() < 0.3:
            content = damaged(content, chance)
        elif chance.random() < 0.5:
            content = yaml.dump(values, allow_unicode=chance.random() < 0.5).encode(errors="surrogatepass")
        else:  # texts as they are, not quoted
            content = "".join(f"{name}: {value}\n" for name, value in values.items()).encode(errors="surrogatepass")
        self.file.write_bytes(content)
        flags = ["--config", str(self.file)] if chance.random() < 0.8 else []
        for _ in range(chance.choice([0, 0, 1, 3])):
            name = f"--{chance.choice([*knobs(), *TEXTS])}"
            value = str(self._value(chance))
            flags += chance.choice([[name], [name, value], [f"{name}={value}"], [value]])
        if chance.random() < 0.2:
            read_words(flags, NoFlags, None, DESCRIPTION, chance.sample(list(knobs()), 10)).values()
            return True
        try:
            config = load_config(flags)
        except SystemExit as end:
            if end.code == 0:  # --help
                return True
            raise
        save_config(config, self.folder / "saved.yaml")
        again = load_config(["--config", str(self.folder / "saved.yaml")])
        if str(config_to_dict(again)) != str(config_to_dict(config)):  # NaN differs from itself
            raise FindingError("the config that was saved is read as another one")
        return True

    def _value(self, chance: random.Random) -> Any:
        return chance.choice([odd(chance), chance.randrange(-3, 1000), chance.random(), chance.choice(TEXTS)])


class Prompts(Target):
    """Files of prompts."""

    name = "prompts"

    def attempt(self, chance: random.Random) -> bool:
        ending = chance.choice(["txt", "csv", "jsonl", "jsonl", "parquet", "parquet", "json"])
        rows: list[dict[str, Any]] = [
            {"text": f"a {word}, red", "negative": "blur", "number": 3, "labels": ["x", {"a": 1}]}
            for word in ("cat", "dog", 'bird "quoted"', "Käfer", "fish\nin two lines")
        ]
        content = self._content(ending, rows, chance)
        if chance.random() < 0.5:
            content = damaged(content, chance)
        if chance.random() < 0.05:
            content = content.decode("utf-8", "replace").encode(
                chance.choice(["utf-16", "latin-1", "utf-32"]), "replace"
            )
        path = self.folder / f"prompts.{ending}"
        path.write_bytes(content)
        names = ["text", "negative", "number", "labels", "absent"]
        columns = Columns(
            chance.choice([*["text"] * 8, "number", "absent"]),
            chance.choice([None, None, "negative", "number"]),
            metadata=tuple(chance.sample(names, chance.choice([0, 0, 1, 2]))),
        )
        prompts = load_prompts(str(path), chance.choice([None, None, 1, 3]), chance.choice([None, columns]))
        for prompt in prompts:
            if not isinstance(prompt.text, str) or not prompt.text.strip() or "\0" in prompt.text:
                raise FindingError(f"a prompt that is none: {str(prompt)!r:.100}")
            prompt.text.encode()
        return True

    def _content(self, ending: str, rows: list[dict[str, Any]], chance: random.Random) -> bytes:
        if ending == "txt":
            return "".join(f"{row['text']}\n" for row in rows).encode() + chance.choice(TEXTS).encode(
                errors="surrogatepass"
            )
        if ending == "parquet":
            return self._parquet(rows, chance)
        while chance.random() < 0.6:
            rows = bent(rows, chance) if ending == "json" else [*rows[:-1], bent(rows[-1], chance)]
        if ending == "csv":
            quoted = [
                '"' + str(cell).replace('"', '""') + '"'
                for row in rows
                if isinstance(row, dict)
                for cell in row.values()
            ]
            lines = [",".join(quoted[at : at + 4]) for at in range(0, len(quoted), 4)]
            return "\n".join(["text,negative,number,labels", *lines]).encode(errors="surrogatepass")
        if ending == "json":
            return as_json(rows, chance)
        return b"\n".join(as_json(row, chance) for row in rows)

    def _parquet(self, rows: list[dict[str, Any]], chance: random.Random) -> bytes:
        kinds: list[Any] = [pyarrow.string(), pyarrow.large_string(), pyarrow.binary(), pyarrow.int64(), pyarrow.null()]
        kinds += [pyarrow.dictionary(pyarrow.int8(), pyarrow.string()), pyarrow.list_(pyarrow.string())]
        kinds += [pyarrow.timestamp("ns"), pyarrow.struct([("a", pyarrow.string())]), pyarrow.float16()]
        columns = {name: pyarrow.array([str(row[name]) for row in rows]) for name in ("text", "negative")}
        columns["number"] = pyarrow.array([row["number"] for row in rows])
        for name in list(columns):
            if chance.random() < 0.2:
                columns[name] = pyarrow.nulls(len(rows), chance.choice(kinds))
        table = pyarrow.table(columns)
        if chance.random() < 0.2:
            about = as_json(
                bent({"info": {"features": {"text": {"dtype": "string", "_type": "Value"}}}}, chance), chance
            )
            table = table.replace_schema_metadata({"huggingface": about})
        file = pyarrow.BufferOutputStream()
        pyarrow.parquet.write_table(table, file, compression=chance.choice(["NONE", "SNAPPY", "ZSTD"]))
        return bytes(file.getvalue())


class Adapters(Target):
    """Adapters of several formats, read alone and into a base."""

    name = "adapters"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        from tests.pipelines import tiny_stable_diffusion

        self.pipeline = tiny_stable_diffusion()
        unet = self.pipeline.unet
        self.weights = sorted(unet.state_dict())
        attach_lora(unet, target_modules=["to_q", "to_out.0", "conv1"], rank=2, lora_alpha=4)
        for parameter in lora_parameters(unet).values():
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
        ours = save_lora(self.pipeline, folder / "ours")
        kohya = folder / "kohya.safetensors"
        export_adapter(find_adapter(str(ours)), kohya)
        unload_lora(self.pipeline)
        self.kinds = [self._read(ours), self._read(kohya)]
        tensors, metadata = self.kinds[0]
        bare = {f"base_model.model.{name.removeprefix('unet.')}": value for name, value in tensors.items()}
        self.kinds.append((bare, {}))
        settings = json.loads(metadata["lora_adapter_metadata"])
        self.settings = {name.removeprefix("unet."): value for name, value in settings.items()} | {"peft_type": "LORA"}

    def _read(self, path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118

    def attempt(self, chance: random.Random) -> bool:
        place = self.folder / "adapter"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        kind = chance.randrange(len(self.kinds))
        tensors, metadata = dict(self.kinds[kind][0]), dict(self.kinds[kind][1])
        for _ in range(chance.choice([0, 1, 1, 3])):
            self._change(tensors, chance)
        if "lora_adapter_metadata" in metadata and chance.random() < 0.4:
            settings = self._settings(json.loads(metadata["lora_adapter_metadata"]), chance)
            metadata["lora_adapter_metadata"] = settings.decode(errors="replace")
        is_peft = kind == 2
        path = place / ("adapter_model" if is_peft else "pytorch_lora_weights")
        if chance.random() < 0.25:
            path = path.with_suffix(chance.choice([".bin", ".safetensors"]))
            content: Any = tensors if chance.random() < 0.7 else bent(tensors, chance)
            torch.save(content, path, _use_new_zipfile_serialization=chance.random() < 0.7)
        else:
            path = path.with_suffix(".safetensors")
            save_file({name: value.contiguous() for name, value in tensors.items()}, path, metadata)
        if chance.random() < 0.4:
            path.write_bytes(damaged(path.read_bytes(), chance))
        if is_peft and chance.random() < 0.9:
            (place / "adapter_config.json").write_bytes(self._settings(self.settings, chance))
        files = find_adapter(str(place))
        try:
            check_adapter(files)
            with adapter_loaded(self.pipeline, files):
                pass
        finally:
            if sorted(self.pipeline.unet.state_dict()) != self.weights:
                raise FindingError("the base is not as it was")
        return True

    def _settings(self, settings: dict[str, Any], chance: random.Random) -> bytes:
        """Of the adapter, with patterns of layers' names as anyone may write them."""
        if chance.random() < 0.3:
            name = chance.choice([key for key in settings if key.endswith("_pattern")])
            settings = settings | {name: {chance.choice(TEXTS): chance.choice([2, 4, odd(chance)])}}
        return as_json(bent(settings, chance) if chance.random() < 0.7 else settings, chance)

    def _change(self, tensors: dict[str, Tensor], chance: random.Random) -> None:
        """One tensor dropped, renamed, of another shape or dtype, or with numbers that are none."""
        name = chance.choice(list(tensors) or ["a"])
        old = tensors.pop(name, torch.ones(1))
        shape = [chance.choice([0, 1, 2, 3, 8]) for _ in range(chance.randrange(5))]
        alpha = name.rpartition(".lora")[0] + ".alpha"
        dtypes = [torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.bool, torch.float8_e4m3fn]
        match chance.randrange(8):
            case 0:
                return
            case 1:
                tensors[damaged(name.encode(), chance).decode(errors="replace").replace("__metadata__", "")] = old
            case 2:
                tensors[chance.choice([f"text_encoder.{name}", f"module.{name}", name.upper(), f"{name}.{name}"])] = old
            case 3:
                tensors[name] = torch.ones(shape)
            case 4:
                tensors[name] = old.float().to(chance.choice(dtypes))
            case 5:
                tensors[name] = torch.full(old.shape, chance.choice([float("nan"), float("inf"), 1e38, 1e-45, 0.0]))
            case 6:
                tensors |= {name: old, alpha: torch.tensor(chance.choice([0.0, -4.0, 1e38, float("nan"), 3.0]))}
            case 7:
                tensors |= {name: old, chance.choice(TEXTS[:5]) + "x": torch.ones(shape)}


class Checkpoints(Target):
    """Damage must be noticed, and the older checkpoint taken; what is whole but crafted must be refused clearly."""

    name = "checkpoints"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.sound = folder / "sound"
        writer = CheckpointManager(self.sound)
        states = {"lora": {"a": torch.ones(2, 2)}, "numbers": [1, 2.5, "text", None]}
        for step in (1, 2):
            writer.save(step, states, lambda aside: aside.joinpath("adapter.safetensors").write_bytes(bytes(200)))
        self.files = {path.name: path.read_bytes() for path in (self.sound / "checkpoint-2").iterdir()}
        self.contents = read_manifest(self.sound / "checkpoint-2")

    def attempt(self, chance: random.Random) -> bool:
        output_dir = self.folder / "run"
        shutil.rmtree(output_dir, ignore_errors=True)
        shutil.copytree(self.sound, output_dir)
        newest = output_dir / "checkpoint-2"
        is_crafted = chance.random() < 0.4
        for _ in range(chance.choice([1, 1, 2])):
            self._damage(newest, chance)
        if is_crafted:
            self._craft(newest, chance)
        manager = CheckpointManager(output_dir)
        path = manager.resolve("latest")
        manager.resolve("checkpoint-1")
        if path == newest:
            if not is_crafted and not self._is_sound(newest):
                raise FindingError("a damaged checkpoint passes for whole")
            manager.load(newest)
            return True
        manager.resolve("checkpoint-2")  # which says why
        raise FindingError("a checkpoint is passed over as damaged, and taken when it is named")

    def _damage(self, folder: Path, chance: random.Random) -> None:
        name = chance.choice([*self.files, MANIFEST_NAME])
        match chance.randrange(6):
            case 0:
                (folder / name).unlink(missing_ok=True)
            case 1:
                (folder / name).write_bytes(self.files[chance.choice(list(self.files))])
            case 2:
                contents = bent(json.loads(self.files[MANIFEST_NAME]), chance)
                (folder / MANIFEST_NAME).write_bytes(as_json(contents, chance))
            case _:
                (folder / name).write_bytes(damaged(self.files[name], chance))

    def _craft(self, folder: Path, chance: random.Random) -> None:
        """A manifest whose sums are right."""
        contents = json.loads(self.files[MANIFEST_NAME])
        del contents["manifest_sha256"]
        for name in contents["files"]:
            path = folder / name
            content = path.read_bytes() if path.exists() else b""
            contents["files"][name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        if chance.random() < 0.6:
            contents = bent(contents, chance)
        if isinstance(contents, dict):
            whole = json.dumps(contents, sort_keys=True).encode()
            contents["manifest_sha256"] = hashlib.sha256(whole).hexdigest()
        (folder / MANIFEST_NAME).write_text(json.dumps(contents))

    def _is_sound(self, folder: Path) -> bool:
        """Blanks between the manifest's values mean nothing."""
        there = {path.name: path.read_bytes() for path in folder.iterdir()}
        unchanged = all(there[name] == content for name, content in self.files.items() if name != MANIFEST_NAME)
        return unchanged and read_manifest(folder) == self.contents
