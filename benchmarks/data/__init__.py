"""Photographs and their labels.

In: what the command line calls them (a folder, an archive, COCO, VOC, a hub). Out: an `ImageSet`, its classes, and its
pictures prepared as a checkpoint wants them.
"""
