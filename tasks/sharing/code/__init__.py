"""What goes into a shared folder as code: written here, checked and tested like everything else, and bundled by
`tasks/sharing/bundle.py` with what it needs of `models`, so that diffusers loads the folder without this project."""
