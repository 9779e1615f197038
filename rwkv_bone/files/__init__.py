"""Files: the only room that opens and writes tensors. May be imported by everything but models/, ops/, peft/ and data/."""
