"""What graphs are made from and described by, as data: plan, shapes, spec, manifest, and the errors.

Records are validated and immutable; they read and write no bundle and know no library but pydantic. This is the
lowest room: it uses none of the others.
"""
