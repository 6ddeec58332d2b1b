"""Pictures with prompts: generated scenes, folders, JSONL files, Hugging Face data sets.

May use calibrate.reference.records, which says what the reference takes of a sample.
"""
