"""The index of images: from folders, lists or arrays, whole or long-tailed, and which files are broken."""
