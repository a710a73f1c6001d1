"""Vision tower, connector and decoder, and their kernels per platform; independent of flags, files and meshes."""
