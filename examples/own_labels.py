"""Use your own labels: train only the classifier of a timm model, wrap it, choose lam, and save it.

    python examples/own_labels.py photos --model resnet50 --out my-model --push user/my-model

`photos/labels.csv` has two columns: `file`, and `labels` with the names of the objects in the picture, separated by
spaces. A name contains neither spaces nor commas.
Needs pip install '.[examples]'.
"""

import argparse
import csv
from collections.abc import Iterable, Iterator
from pathlib import Path

import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn

import timm_csra
from timm_csra.pictures import UNREADABLE, open_upright

FEWEST = 12  # pictures: half of them train the classifier, and tune needs three folds of two


def batches(
    folder: Path, model: nn.Module, names: list[str], rows: list[dict[str, str]], size: int = 32
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches of transformed images with their targets: 1 for each class in the picture, 0 for the others."""
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    for some in (rows[start : start + size] for start in range(0, len(rows), size)):
        images = [transform(picture(folder / row["file"])) for row in some]
        labels = [[name in row["labels"].split() for name in names] for row in some]
        yield torch.stack(images), torch.tensor(labels).float()


def picture(file: Path) -> Image.Image:
    """Open a picture; raise SystemExit with one line if it cannot be read."""
    try:
        return open_upright(file)
    except UNREADABLE as error:
        raise SystemExit(f"{file}: not read as a picture: {error}") from error


def train_classifier(model: nn.Module, loader: Iterable[tuple[Tensor, Tensor]], steps: int = 300) -> None:
    """Train the classifier with a sigmoid for each class. The backbone stays fixed: its features are computed once."""
    with torch.no_grad():
        found = [(model.forward_head(model.forward_features(x), pre_logits=True), y) for x, y in loader]
    features, targets = (torch.cat(part) for part in zip(*found, strict=True))
    classifier = model.get_classifier()
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=1e-2, weight_decay=1e-2)
    for _ in range(steps):
        loss = nn.functional.binary_cross_entropy_with_logits(classifier(features), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def read_labels(folder: Path) -> list[dict[str, str]]:
    """Read the rows of `labels.csv`; raise SystemExit with one line that says what is wrong with it."""
    path = folder / "labels.csv"
    if not path.is_file():
        raise SystemExit(f"{path}: no such file; expected a table with the columns file and labels.")
    with path.open(encoding="utf-8-sig", newline="") as file:  # -sig: spreadsheets write a byte order mark
        reader = csv.DictReader(file)
        rows, columns = list(reader), reader.fieldnames or []
    if not {"file", "labels"} <= set(columns):
        raise SystemExit(f"{path}: found the columns {', '.join(columns) or 'none'}; expected file,labels.")
    for number, row in enumerate(rows, 2):
        if not row["file"] or row["labels"] is None or None in row:
            raise SystemExit(f"{path}, row {number}: found {list(row.values())}; expected a file and its labels.")
        if "," in row["labels"] or ";" in row["labels"]:
            raise SystemExit(f"{path}, row {number}: found the labels {row['labels']!r}; expected spaces between them.")
        if not (folder / row["file"]).is_file():
            raise SystemExit(f"{path}, row {number}: no such picture: {folder / row['file']}.")
    names = {name for row in rows for name in row["labels"].split()}
    if len(rows) < FEWEST or len(names) < 2:
        found = f"{len(rows)} pictures of {len(names)} labels"
        raise SystemExit(f"{path}: found {found}; expected {FEWEST} or more pictures of two or more labels.")
    return rows


def main(arguments: list[str] | None = None) -> nn.Module:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--model", default="resnet50", help="as timm.create_model takes it (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("my-model"), help="default: %(default)s")
    parser.add_argument("--push", metavar="USER/NAME", help="also to the Hugging Face Hub")
    args = parser.parse_args(arguments)
    torch.manual_seed(0)

    rows = read_labels(args.photos)
    names = sorted({name for row in rows for name in row["labels"].split()})
    order = torch.randperm(len(rows)).tolist()
    train, held_out = ([rows[i] for i in part] for part in (order[::2], order[1::2]))

    if args.out.exists() and not args.out.is_dir():
        raise SystemExit(f"--out {args.out}: found a file; expected a folder, or the name of a new one.")
    try:
        model = timm.create_model(args.model, pretrained=True, num_classes=len(names)).eval()  # with a new classifier
    except (OSError, RuntimeError, ValueError) as error:
        raise SystemExit(f"--model {args.model}: {error}") from error
    model.pretrained_cfg["label_names"] = names  # saved with the model
    train_classifier(model, batches(args.photos, model, names, train))

    # On logits, because the classifier was trained with a sigmoid; lam is 0 where nothing says that another one helps.
    found = timm_csra.tune(model, batches(args.photos, model, names, held_out), scores="logits")
    print(found)
    timm_csra.wrap(model, lam=found.lam, temperature=found.temperature, scores="logits")

    timm_csra.save_pretrained(model, args.out)  # timm_csra.from_pretrained(args.out) loads it
    if args.push:
        print(timm_csra.push_to_hub(model, args.push).commit_url)
    return model


if __name__ == "__main__":
    main()
