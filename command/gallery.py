"""What other programs read in a picture: the `parameters` text that image galleries know, and XMP that says that the
picture is synthetic. Neither is a signature: anybody can write or remove them."""

import json
from pathlib import Path

# IPTC's vocabulary of the origins of pictures, https://cv.iptc.org/newscodes/digitalsourcetype
ORIGIN = "http://cv.iptc.org/newscodes/digitalsourcetype/"
# XMP (ISO 16684-1) in a PNG is the international text XML:com.adobe.xmp, uncompressed.
XMP_KEY = "XML:com.adobe.xmp"
XMP = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"'
    ' Iptc4xmpExt:DigitalSourceType="{origin}"/></rdf:RDF></x:xmpmeta><?xpacket end="w"?>'
)
NAMES = {  # option -> its name in the text, where the A1111 web UI has one or this project gives one
    "steps": "Steps", "sampler": "Sampler", "guidance": "CFG scale", "seed": "Seed", "size": "Size",
    "weights": "Model", "eta": "Eta", "k_max": "MagicMix k_max", "k_min": "MagicMix k_min", "nu": "MagicMix nu",
    "layout": "MagicMix layout", "layout_prompt": "MagicMix layout prompt", "token_weights": "MagicMix token weights",
}  # fmt: skip


def parameters(options: dict) -> str:
    """The options in a picture as the A1111 web UI writes them: the prompt, the negative prompt on a line of its own,
    and a line of names and values. Options that it does not have are named after MagicMix."""
    fields = ", ".join(
        f"{text}: {quoted(shown(name, options[name]))}" for name, text in NAMES.items() if name in options
    )
    negative = options.get("negative")
    return "\n".join([options.get("prompt", ""), *([f"Negative prompt: {negative}"] if negative else []), fields])


def shown(name: str, value: object) -> str:
    if name == "size":
        return f"{value[1]}x{value[0]}"
    if name == "token_weights":
        return ", ".join(f"{word}={s}" for word, s in value.items())
    if name == "weights":
        value = Path(value).name
    text = str(value).encode(errors="replace").decode()  # a path may not be UTF-8
    return text.upper() if name == "sampler" else text


def quoted(text: str) -> str:
    """In JSON where commas, colons or line ends would break the line of fields."""
    return json.dumps(text, ensure_ascii=False) if any(c in text for c in ',:\n"') else text


def xmp(options: dict) -> str:
    """Says that the picture is the work of a trained model: alone, or together with the layout's picture."""
    kind = "compositeWithTrainedAlgorithmicMedia" if "layout" in options else "trainedAlgorithmicMedia"
    return XMP.format(origin=ORIGIN + kind)
