"""Read photographs and their labels.

In: a specification of `--data` (a folder, an archive, COCO, VOC, a hub). Out: an `ImageSet`, its classes, and its
images with a checkpoint's preprocessing.
"""
