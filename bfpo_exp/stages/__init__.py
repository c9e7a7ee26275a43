"""The pipeline's stages, each reusing from the store what an earlier run has made."""
