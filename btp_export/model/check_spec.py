"""Whether a bundle's spec is what its own config.json and weights say."""

from btp_export.families import family_of
from graphs.files.bundle import Bundle
from graphs.records.errors import InputError

COMPARED = ("decoder", "vision", "image_token_id", "eos_token_ids", "pad_token_id", "weight_dtype")


def check_spec(bundle: Bundle) -> None:
    """Raise InputError unless the family makes the same spec from the bundle's files; names what differs.

    What the user chose (name, system message) and what earlier versions did not record is not compared.
    """
    expected = family_of(bundle.spec).spec(bundle.checkpoint(), bundle.spec.name)
    for name in COMPARED:
        got, wanted = getattr(bundle.spec, name), getattr(expected, name)
        if name == "vision" and got.class_token is None:
            wanted = wanted.model_copy(update={"class_token": None})
        if got == wanted:
            continue
        if name in ("decoder", "vision"):
            inner = next(key for key in type(got).model_fields if getattr(got, key) != getattr(wanted, key))
            name, got, wanted = f"{name}.{inner}", getattr(got, inner), getattr(wanted, inner)
        raise InputError(
            f"{bundle.root / 'manifest.json'} says {name} {got}",
            wanted=f"{wanted}, as processor/config.json and the weights say",
            do="export it again, or restore the file",
        )
