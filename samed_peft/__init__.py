"""samed_peft: parameter-efficient finetuning of the Segment Anything Model on medical scans."""
