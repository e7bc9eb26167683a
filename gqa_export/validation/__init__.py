"""A bundle compared with PyTorch: which sessions are opened, which cases are run, what is reported."""
