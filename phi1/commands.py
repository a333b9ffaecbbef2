"""The sub-commands of `phi1`.

A sub-command's module has a dataclass `Config` (its options, each with a docstring that gives the unit) and a function
`run(config)`. One that reads its own command line has a function `parse(arguments)`, which returns the `Config`.
"""

# sub-command -> (module, one line for --help)
COMMANDS: dict[str, tuple[str, str]] = {
    "data ingest": ("data_tools.ingest", "read code and text into a dataset"),
    "data annotate": ("data_tools.annotate", "ask an LLM for the educational value of a sample of documents"),
    "data embed": ("data_tools.embed", "embed documents with a pretrained model"),
    "data classify": ("data_tools.classify", "train a random forest to predict the annotation from the embedding"),
    "data filter": ("data_tools.filter", "keep the documents that the forest rates high enough"),
    "data synthesize": ("data_tools.synthesize", "write textbooks and exercises, with an LLM or the offline teacher"),
    "data rewrite": ("data_tools.rewrite", "rewrite code with an LLM: compile, lint, style, self-contained"),
    "data diversity": ("data_tools.diversity", "measure how different the texts of a dataset are from each other"),
    "data decontaminate": ("data_tools.decontaminate", "drop what is too close to HumanEval"),
    "data tokenizer": ("data_tools.tokenizer", "train a small tokenizer for a small model"),
    "data plan": (
        "data_tools.plan",
        "what phi-1's data will take: tokens, hours, money, by the pace of stages run here",
    ),
    "data tokenize": ("data_tools.tokenize", "turn documents into token shards"),
    "train": ("phi1.recipe", "pretrain or finetune from a recipe (or: torchrun -m phi1 train)"),
    "plan": ("phi1.plan", "what a recipe will take: memory, work and days on given GPUs"),
    "generate": ("phi1.generate", "complete a prompt"),
    "evaluate": ("phi1.evaluate.run", "HumanEval, held-out exercises, an LLM's grade"),
    "study": ("data_tools.study", "prune what is near the benchmark, retrain, compare: the paper's table 3"),
    "export": ("phi1.export", "write a checkpoint as a Hugging Face PhiForCausalLM folder"),
    "import": ("phi1.import_", "read a Hugging Face Phi or CodeGen folder into a checkpoint"),
    "report": ("data_tools.report", "one HTML page of what a run did"),
    "doctor": ("phi1.doctor", "what this machine has, which kernels each op takes on it and why"),
    "tune": ("phi1.tune", "measure which kernels are fastest on this machine"),
    "completion": ("phi1.completion", "completion of these commands and their options for bash, zsh or fish"),
    "quickstart": ("data_tools.quickstart", "the whole of phi-1, small: data, training, evaluation, report"),
}
