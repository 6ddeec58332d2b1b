"""What graphs are made from and described by, as data: plan, shapes, spec, manifest, and the errors.

Records are validated and immutable; they read and write no bundle and know no library but pydantic. Here is also how
anything that others wrote is read (reading.py), and the boundary around libraries that parse it (refusing.py).
This is the lowest room: it uses none of the others.
"""
