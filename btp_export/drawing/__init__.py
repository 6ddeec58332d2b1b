"""Pictures: kept tokens on an image, and figures as SVG.

Knows numbers and images, no bundle. Uses no other room.
"""
