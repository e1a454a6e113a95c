"""Command lines with something wrong in them, and what must be said of it (`test_bad_input`)."""

from typing import NamedTuple


class Case(NamedTuple):
    """A command line ({w} is the folder of `world`, {train} a training command that works), and what must be said."""

    name: str
    line: str
    words: tuple[str, ...]


TRAIN = (
    "train tiny --folder {w}/new --source {w}/text.txt --data.cache-dir {w}/../cache --layers 2 --width 32 --heads 4 "
    "--warmup 1 --steps 2 --progress off --evaluate-batches 1 --sample.tokens 0"
)
GENERATE = "generate --tokens 4 --model {w}/"

CASES = [
    # words
    Case("unknown command", "trian", ("'trian'", "did you mean train")),
    Case("nonsense command", "xyzzy", ("'xyzzy'", "train", "generate", "doctor")),
    Case("unknown preset", "train tinny", ("'tinny'", "did you mean tiny")),
    Case("unknown option", "{train} --layer 3", ("--layer", "did you mean", "--model.layers")),
    Case("unknown nonsense option", "{train} --frobnicate 3", ("--frobnicate", "--help")),
    Case("wrong type", "{train} --model.layers two", ("--model.layers takes a whole number", "'two'")),
    Case(
        "wrong type of a number",
        "{train} --optimiser.schedule.peak fast",
        ("--optimiser.schedule.peak takes a number", "'fast'"),
    ),
    Case("missing value", "{train} --model.layers", ("--model.layers",)),
    Case("two values", "{train} --optimiser muon lion", ("--optimiser", "takes one value", "2", "muon lion")),
    Case("unknown strategy", "{train} --optimiser adamq", ("adamq", "did you mean", "adam-w")),
    Case("unknown literal", "{train} --remat sometimes", ("sometimes", "full")),
    Case("a word without dashes", "explain tiny 7", ("'7'", "not an option")),
    # meshes and devices
    Case("heads by tensor", "{train} --heads 2 --mesh data=2,tensor=4", ("2", "4", "heads", "tensor")),
    Case("batch by data", "{train} --batch 12 --mesh data=8", ("12", "8", "data")),
    Case("batch by all devices", "{train} --batch 12", ("12", "8", "data")),
    Case("vocabulary", "{train} --vocabulary-multiple 1 --mesh data=4,tensor=2", ("257", "2", "vocabulary")),
    Case("mesh too small", "{train} --mesh data=2", ("data(2)", "= 2", "8 devices", "nearest")),
    Case("mesh too big", "{train} --mesh data=16", ("data(16)", "= 16", "8 devices")),
    Case("devices that do not exist", "{train} --mesh data=3", ("data(3)", "8 devices", "nearest")),
    Case("rest that does not fit", "{train} --mesh fsdp=3,data=rest", ("fsdp(3)", "8")),
    Case("unknown mesh axis", "{train} --mesh dta=2", ("'dta'", "'data'")),
    Case("mesh axis of no devices", "{train} --mesh data=0", ("data", "0", "at least 1")),
    Case("mesh without a number", "{train} --mesh data=two", ("data", "'two'")),
    Case("no fake devices", "{train} --fake-devices 0", ("fake_devices", "0", "at least 1")),
    Case("more stages than layers", "{train} --mesh stage=8", ("8 pipeline stages", "2 layers", "at most 2")),
    Case(
        "chunks by layers",
        "{train} --mesh stage=2,data=4 --pipeline.schedule interleaved",
        ("2 chunks = 4", "2 layers"),
    ),
    Case(
        "microbatches that do not divide",
        "{train} --mesh data=4,stage=2 --pipeline.microbatches 3",
        ("2 rows on each device", "pipeline.microbatches = 3", "nearest that works: 2"),
    ),
    Case(
        "interleaving that the schedule does not allow",
        "{train} --mesh data=4,stage=2 --layers 4 --pipeline.schedule interleaved --pipeline.microbatches 1",
        ("interleaved", "groups of 2 microbatches", "nearest: 2"),
    ),
    Case("unknown schedule", "{train} --mesh data=4,stage=2 --pipeline.schedule 1fb1", ("'1fb1'", "'1f1b'")),
    Case("schedule of no file", "{train} --mesh data=4,stage=2 --pipeline.schedule x.csv", ("x.csv", "no such file")),
    Case(
        "schedule that cannot end",
        "{train} --mesh data=4,stage=2 --pipeline.schedule {w}/cycle.csv",
        ("cycle",),
    ),
    Case(
        "sequence too short for the ring",
        "{train} --mesh sequence=8 --length 24",
        ("24 tokens", "zigzag", "multiple of 16", "nearest that works: 32"),
    ),
    Case(
        "branches around a ring",
        "{train} --mesh data=2,stage=2,sequence=2 --pipeline.ticks mixed",
        ("mixed", "sequence", "one-kind"),
    ),
    Case(
        "groups of a hybrid",
        "{train} --mesh data=2,sequence=4 --sequence.attention hybrid --sequence.exchange 3",
        ("sequence.exchange = 3", "sequence(4)", "nearest that works: 2"),
    ),
    Case(
        "tokens by tensor",
        "{train} --mesh data=2,tensor=4 --tensor.products ring --length 30",
        ("'ring'", "tensor(4)", "30 / 4", "nearest length that works: 32"),
    ),
    Case(
        "tokens by sequence and tensor",
        "{train} --mesh data=2,sequence=2,tensor=2 --tensor.products gathered --length 38 --sequence.layout contiguous",
        ("'gathered'", "sequence(2) × tensor(2)", "38 / 4", "nearest length that works: 40"),
    ),
    # number formats
    Case("unknown number format", "{train} --quantise mxfp9", ("'mxfp9'", "did you mean mxfp")),
    Case("blocks that do not divide", "{train} --quantise mxfp8 --hidden 80", ("model.hidden = 80", "64 or 96")),
    Case("unknown op to tune", "tune atention", ("'atention'", "did you mean attention")),
    Case("no chip to tune for", "tune quant_matmul", ("on a TPU or an NVIDIA GPU", "--topology v5e:2x2")),
    Case("rounds without a median", "tune --rounds 1", ("rounds = 1", "at least 3")),
    Case("bits that there are not", GENERATE + "run --quantise w5a16", ("'w5a16'", "w8a16", "kv4")),
    Case(
        "one row in two halves",
        "{train} --mesh data=4,tensor=2 --tensor.products weave --batch 4",
        ("'weave'", "1 row ", "2 rows on each of 4 devices, 8 together"),
    ),
    Case(
        "one row of a microbatch in two halves",
        "{train} --mesh data=2,stage=2,tensor=2 --tensor.products weave --pipeline.microbatches 4 --batch 8",
        ("pipeline.microbatches = 4", "1 of the 4 rows", "'weave'", "nearest that works: 2"),
    ),
    Case(
        "branches around products in rings",
        "{train} --mesh data=2,stage=2,tensor=2 --tensor.products ring --pipeline.ticks mixed",
        ("mixed", "rings over the tensor axis", "one-kind"),
    ),
    Case(
        "explain: tokens by tensor",
        "explain tiny --length 30 --mesh tensor=4 --tensor.products weave",
        ("30 / 4", "32"),
    ),
    Case("autodiff of another schedule", "{train} --pipeline.executor autodiff", ("autodiff", "1f1b", "gpipe")),
    # stages that are lost
    Case("lost, and no recovery", "{train} --failure-rate 0.9", ("loses stage", "recovers nothing", "--recovery")),
    Case("too few stages", "{train} --recovery checkfree", ("check-free", "at least 3 stages", "got 2")),
    Case(
        "a stage that does not exist",
        "{train} --layers 4 --recovery checkfree --failures.at 1:4",
        ("failures.at", "stage 4", "step 1", "4 stages", "0 to 3"),
    ),
    Case(
        "a step that does not exist",
        "{train} --layers 4 --recovery checkfree --failures.at 3:1",
        ("stage 1", "step 3", "1 to 2"),
    ),
    Case(
        "adjacent losses",
        "{train} --layers 4 --recovery checkfree --failures.at 2:1,2:2",
        ("step 2", "stages 1 and 2 of 4", "check-free", "composite"),
    ),
    Case(
        "an edge stage",
        "{train} --layers 4 --recovery uniform-average --failures.at 2:3",
        ("step 2", "stage 3 of 4", "uniform-average", "--failures.fallible middle"),
    ),
    Case(
        "a schedule that does not swap",
        "{train} --layers 4 --recovery checkfree-plus --mesh data=2,stage=4 --pipeline.schedule gpipe",
        ("'gpipe' does not swap", "check-free-plus", "checkfree+", "--recovery.no-swaps"),
    ),
    Case(
        "rows that cannot swap",
        "{train} --layers 4 --recovery checkfree-plus --mesh data=8 --data.batch 8",
        ("8 rows do not divide into", "microbatches = 2 on each of 8 devices", "nearest: 16", "--recovery.no-swaps"),
    ),
    Case(
        "paths and swaps",
        "{train} --layers 4 --recovery checkfree-plus --skipping skip-paths",
        ("skip-paths", "an order of its own", "--recovery.no-swaps"),
    ),
    Case("stages by layers", "{train} --recovery redundant --failures.stages 3", ("failures.stages = 3", "layers = 2")),
    Case(
        "failures in no file",
        "{train} --layers 4 --recovery redundant --failures.file x.csv",
        ("x.csv", "No such file"),
    ),
    Case("failure rate of 2", "{train} --recovery redundant --failure-rate 2", ("failure_rate = 2.0", "[0, 1]")),
    Case("failures that are none", "{train} --recovery redundant --failures.at 2", ("'2'", "step:stage")),
    Case(
        "no replica",
        "{train} --recovery replica-peer --mesh fsdp=8 --failures.at 1:1",
        ("replica-peer", "data axis has 1", "--mesh"),
    ),
    Case(
        "a copy that cannot see the average",
        "{train} --layers 4 --recovery checkfree-plus --recovery.no-swaps --norm-point post-clip --step.ema ema",
        ("check-free-plus", "post-clip", "average", "pre-clip"),
    ),
    Case(
        "going back for ever",
        "{train} --layers 4 --recovery snapshot --failure-rate 1",
        ("snapshot", "of 2", "iterations", "lower the failure rate"),
    ),
    Case("inspect: no model", "inspect --model {w}/nothing", ("nothing", "run's folder")),
    Case("inspect: too long", "inspect --model {w}/run --length 5000", ("5000", "context", "length")),
    Case("inspect: confidence", "inspect --model {w}/run --confidence 0.5 1.5", ("1.5", "(0, 1]", "confidence")),
    Case(
        "inspect: too little text",
        "inspect --model {w}/run --source {w}/text.txt --rows 900",
        ("documents of more than", "rows = 900"),
    ),
    Case("explain: stages", "explain tiny --mesh stage=4", ("4 pipeline stages", "2 layers")),
    Case("explain: heads by tensor", "explain tiny --heads 4 --mesh tensor=8", ("4", "8", "heads")),
    Case("explain: batch", "explain tiny --batch 6 --mesh data=4", ("6", "4", "batch")),
    Case("coordinator alone", "{train} --distributed.coordinator 127.0.0.1:9", ("127.0.0.1:9", "process count")),
    Case("coordinator without port", "{train} --distributed.coordinator somewhere", ("'somewhere'", "host:port")),
    Case("processes alone", "{train} --distributed.processes 2", ("2", "coordinator")),
    # text and tokenisers
    Case("missing text", "{train} --source {w}/nothing.txt", ("nothing.txt", "not found")),
    Case("empty text", "{train} --source {w}/empty.txt", ("empty.txt", "no text")),
    Case("empty folder", "{train} --source {w}/empty", ("empty", "no file")),
    Case("too little text", "{train} --source {w}/short.txt --data.validation-fraction 0.5", ("split", "64")),
    Case("missing tokenizer", "{train} --tokenizer {w}/no.json", ("no.json", "not found")),
    Case("corrupted tokenizer", "{train} --tokenizer {w}/broken_tokenizer/tokenizer.json", ("tokenizer.json",)),
    Case("folder without tokenizer", "{train} --tokenizer {w}/empty", ("empty", "tokenizer")),
    Case("JSONL: not JSON", "{train} --source {w}/torn.jsonl", ("line 2", "torn.jsonl", "not JSON")),
    Case("JSONL: no field", "{train} --source {w}/other.jsonl", ("line 1", "'text'", "'body'")),
    Case("NaN weight", "{weighted} --source.path {w}/nan.jsonl", ("line 2", "'weight'", "nan")),
    Case("negative weight", "{weighted} --source.path {w}/negative.jsonl", ("line 2", "'weight'", "-1")),
    Case("weight in words", "{weighted} --source.path {w}/word.jsonl", ("line 2", "'weight'", "string")),
    Case("Parquet: no column", "{train} --source {w}/table.parquet", ("table.parquet", "'text'", "'body'")),
    Case("Parquet: not Parquet", "{train} --source {w}/fake.parquet", ("fake.parquet",)),
    Case("validation fraction 0", "{train} --data.validation-fraction 0", ("validation_fraction", "0")),
    Case("empty rows", "{train} --data.length 0", ("data.length", "0")),
    Case(
        "tokenizer too small", "tokenizer train --source {w}/text.txt --vocabulary 100 --out {w}/t.json", ("257", "100")
    ),
    Case("tokenizer from nothing", "tokenizer train --source {w}/empty.txt --out {w}/t.json", ("empty.txt", "no text")),
    Case("tokenizer does what", "tokenizer show", ("jaxpar tokenizer train",)),
    # the run
    Case("schedule longer than the run", "{train} --warmup 5", ("5", "2", "warm-up")),
    Case("no steps", "{train} --steps 0", ("steps", "0", "at least 1")),
    Case("accumulate", "{train} --step.accumulate 3", ("8", "3", "accumulate")),
    Case("no microbatch", "{train} --step.accumulate 0", ("accumulate", "0")),
    Case("clip at 0", "{train} --step.clip.norm 0", ("clip", "0")),
    Case("stages", "{train} --step.clip clip-per-stage --step.clip.stages 4", ("4 stages", "2 layers")),
    Case("average of 1.5", "{train} --step.ema ema --step.ema.decay 1.5", ("1.5", "[0, 1)")),
    Case("window of spikes", "{train} --step.spikes skip-spikes --step.spikes.window 1", ("window", "1", "4")),
    Case("dropout of 2", "{train} --dropout 2", ("dropout", "2", "[0, 1)")),
    Case("attention window of 0", "{train} --model.window 0", ("model.window", "0", "at least 1")),
    Case("width by heads", "{train} --width 30", ("30", "4", "heads")),
    Case("learned positions", "{train} --positions learned --context 32", ("64", "32", "learned")),
    Case(
        "sample beyond the context",
        "{train} --sample.tokens 99 --context 64 --positions learned",
        ("99", "64", "context"),
    ),
    Case("negative temperature", "{train} --sample.sampler.temperature -1", ("temperature", "-1")),
    Case("profile of step 0", "{train} --profile.start 0", ("profile.start", "0")),
    Case("watchdog", "{train} --watchdog.seconds 0", ("watchdog.seconds", "0")),
    # checkpoints and folders
    Case("a file as the folder", "{train} --folder {w}/text.txt", ("text.txt",)),
    Case("folder inside a file", "{train} --folder {w}/text.txt/run", ("text.txt",)),
    Case("foreign folder", "{train} --folder {w}/foreign", ("foreign", "notes.txt", "another folder")),
    Case("another model", "{train} --folder {w}/run --width 64", ("model.width", "32", "64")),
    Case("other data", "{train} --folder {w}/run --source {w}/other.txt", ("run", "data")),
    Case("all checkpoints damaged", "{train} --folder {w}/damaged", ("damaged", "step")),
    Case("marker without checkpoints of this format", "{train} --folder {w}/newer", ("newer", "99")),
    # generate
    Case("skip: no cosine", GENERATE + "run --skip ffn-skip --threshold 1.5", ("threshold = 1.5", "-1 to 1")),
    Case("skip: too few layers", GENERATE + "run --skip ffn-skip", ("first = 1", "last = 1", "2 layers", "leaves 0")),
    Case("pages of nothing", GENERATE + "run --pages paged --pages.page 0", ("pages.page = 0", "at least 1")),
    Case(
        "too few pages",
        GENERATE + "run --pages paged --pages.pages 2 --pages.page 1",
        ("prompt 0", "4 new ones", "pages of 1 tokens", "pages.pages = 2"),
    ),
    Case(
        "pages and holes",
        GENERATE + "run --pages paged --skip ffn-skip --skip.first 0 --skip.last 0",
        ("--pages and --skip", "leave one of the two away"),
    ),
    Case(
        "picked tokens of parts of rows",
        "explain tiny --depth mixture-of-depths --mesh sequence=2",
        ("lie on 2 devices", "sequence=1"),
    ),
    # exits
    Case("exit behind the last layer", "{train} --exits.at 2", ("model.exits.at = (2,)", "1 to 1", "2 layers")),
    Case("exits that fall", "{train} --layers 4 --exits.at 3 1", ("(3, 1)", "must rise", "(1, 3)")),
    Case("exits of sources", "{train} --exits.at 1 --residual mudd-former", ("MuddFormer", "layer 1", "DeepDelta")),
    Case(
        "exits and swaps", "{train} --layers 4 --exits.at 1 --skipping swap-ends", ("(1,)", "swap-ends", "layer-drop")
    ),
    Case("an exit that is not trained", "{train} --exits.at 1 --exits.loss layer-skip", ("LayerSkip", "first layer")),
    Case("weights by exits", "{train} --exits.at 1 --exits.loss ee-llm --weight 1 1", ("2 numbers", "1 exits")),
    Case("no exit to draft", GENERATE + "run --decoding speculate", ("no exits", "2 layers", "--decoding.layer 1")),
    Case("drafts of all", GENERATE + "run --decoding speculate --decoding.layer 2", ("layer 2", "2 layers", "1 to 1")),
    Case("drafts of none", GENERATE + "run --decoding speculate --decoding.layer 1 --draft 0", ("draft = 0",)),
    Case(
        "drafts of draws",
        GENERATE + "run --decoding speculate --decoding.layer 1 --temperature 0.8",
        ("temperature = 0.8", "exit-early"),
    ),
    Case("no exit to leave by", GENERATE + "run --decoding exit-early", ("no exits", "2 layers", "--decoding.at")),
    Case("never sure", GENERATE + "run --decoding exit-early --threshold.value 1.5", ("1.5", "never fire")),
    Case("always sure", GENERATE + "run --decoding exit-early --threshold.value -1", ("-1", "always fire")),
    Case(
        "two ways to leave out",
        GENERATE + "run --decoding exit-early --decoding.at 1 --skip ffn-skip --skip.first 0 --skip.last 0",
        ("--skip", "--decoding", "not combined"),
    ),
    Case("no model", GENERATE + "nowhere", ("nowhere", "no model")),
    Case("empty model folder", GENERATE + "empty", ("empty", "nothing")),
    Case("text as a model", GENERATE + "text.txt", ("text.txt", "GGUF")),
    Case("cut GGUF", GENERATE + "cut.gguf", ("cut.gguf",)),
    Case("unknown model_type", GENERATE + "hf_unknown", ("'nonesuch'", "llama")),
    Case("config without weights", GENERATE + "hf_empty", ("hf_empty", "safetensors")),
    Case("config.json cut short", GENERATE + "hf_torn", ("config.json",)),
    Case("missing tensor", GENERATE + "hf_missing", ("no tensor", "model.norm.weight")),
    Case("no tokenizer", GENERATE + "hf", ("hf", "tokenizer")),
    Case("damaged run", GENERATE + "damaged", ("damaged",)),
    Case("long prompt", GENERATE + "run --prompt " + "x" * 200, ("200", "context", "128")),
    Case("no prompt", GENERATE + "run --prompt", ("prompt",)),
    Case("temperature -1", GENERATE + "run --sampler.temperature -1", ("temperature", "-1")),
    Case("top_k when greedy", GENERATE + "run --top-k 4", ("top_k", "temperature = 0")),
    Case("top_p of 2", GENERATE + "run --temperature 1 --top-p 2", ("top_p", "2", "(0, 1]")),
    Case("no tokens", GENERATE + "run --tokens 0", ("0", "at least 1")),
    # convert
    Case("convert without target", "convert --source {w}/run", ("--target",)),
    Case("convert without source", "convert --target {w}/out", ("--source",)),
    Case("target not empty", "convert --source {w}/run --target {w}/foreign", ("foreign", "not an empty folder")),
    Case("convert nothing", "convert --source {w}/nowhere --target {w}/out", ("nowhere",)),
    Case("no family fits", "convert --source {w}/learned --target {w}/out", ("llama", "LayerNorm", "gpt2")),
]
