"""Draws the sprite sheets of the embedded scenes from the vendors' packages. Users never need this: the sheets ship.

    npm install emoji-datasource-twitter@16.0.0 emoji-datasource-google@16.0.0 @iconify-json/fluent-emoji-flat@1.2.6
    pip install resvg-py==0.5.0
    python -m emo_r3.embedded.make_atlas node_modules

One sheet a vendor, `atlas_<vendor>.png`: SPRITE x SPRITE pixels an object, COLUMNS a row, in the order of objects.json.
`--openmoji FOLDER` draws the optional fourth style (`@iconify-json/openmoji` 1.2.29, CC BY-SA 4.0) into FOLDER; it does not ship.
"""
import argparse
import io
import json
from pathlib import Path

from PIL import Image

SPRITE, COLUMNS = 48, 14
HERE = Path(__file__).parent


def from_png(folder: Path, codepoint: str) -> Image.Image:
    """The 64-pixel drawing of one code point in an `emoji-datasource` package; raises FileNotFoundError."""
    names = [codepoint, codepoint.removesuffix("-fe0f"), codepoint + "-fe0f"]
    for name in names:
        if (file := folder / f"{name}.png").exists():
            return Image.open(file).convert("RGBA")
    raise FileNotFoundError(f"{folder}: no drawing for {codepoint} (looked for {', '.join(names)})")


class IconifyArt:
    "The SVG drawings of an `@iconify-json` package, by code point."
    def __init__(self, folder: Path):
        self.icons = json.loads((folder / "icons.json").read_text(encoding="utf-8"))
        chars = json.loads((folder / "chars.json").read_text(encoding="utf-8"))
        self.name_of = {code.removesuffix("-fe0f"): name for code, name in chars.items()}

    def draw(self, codepoint: str) -> Image.Image:
        "The drawing of one code point, 96 x 96 pixels; raises KeyError."
        import resvg_py
        name = self.name_of[codepoint.removesuffix("-fe0f")]
        name = self.icons.get("aliases", {}).get(name, {}).get("parent", name)
        icon = self.icons["icons"][name]
        width, height = (icon.get(k, self.icons.get(k, 16)) for k in ("width", "height"))
        svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">{icon["body"]}</svg>'
        png = resvg_py.svg_to_bytes(svg_string=svg, width=96, height=96)
        return Image.open(io.BytesIO(bytes(png))).convert("RGBA")


def sheet(draw, objects: list[dict]) -> Image.Image:
    "One vendor's sheet: every object's drawing at SPRITE pixels, row by row."
    rows = -(-len(objects) // COLUMNS)
    out = Image.new("RGBA", (COLUMNS * SPRITE, rows * SPRITE))
    for i, row in enumerate(objects):
        sprite = draw(row["codepoint"]).resize((SPRITE, SPRITE), Image.Resampling.LANCZOS)
        out.paste(sprite, (i % COLUMNS * SPRITE, i // COLUMNS * SPRITE))
    return out.quantize(256, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)


def main() -> None:
    "Writes the three sheets that ship, beside this file (and OpenMoji's where asked)."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", type=Path, help="the node_modules folder")
    parser.add_argument("--openmoji", type=Path, help="draw OpenMoji's sheet into this folder instead")
    args = parser.parse_args()
    objects = json.loads((HERE / "objects.json").read_text(encoding="utf-8"))["objects"]
    png = lambda vendor: lambda code: from_png(args.packages / f"emoji-datasource-{vendor}/img/{vendor}/64", code)
    if args.openmoji:
        args.openmoji.mkdir(parents=True, exist_ok=True)
        sheet(IconifyArt(args.packages / "@iconify-json/openmoji").draw, objects).save(args.openmoji / "atlas_openmoji.png", optimize=True)
        return
    fluent = IconifyArt(args.packages / "@iconify-json/fluent-emoji-flat")
    for name, draw in {"twemoji": png("twitter"), "noto": png("google"), "fluent": fluent.draw}.items():
        sheet(draw, objects).save(HERE / f"atlas_{name}.png", optimize=True)


if __name__ == "__main__":
    main()
