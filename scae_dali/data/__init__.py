"""The index of images, whole or long-tailed: from folders, lists or arrays; its broken files."""
