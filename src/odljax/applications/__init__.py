"""Applications: real problems, their data and their trained models, built only from the library's nouns."""
