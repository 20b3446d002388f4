"""llama-server's flags that are not ours to plan: which are handed on, left out or refused, and why.

The flags that the planner does plan are in ``planner.flags``. Together they are all flags of the pinned llama-server
(common/arg.cpp, ``common_params_parser_init``, LLAMA_EXAMPLE_SERVER); a test compares them with its ``--help``.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Final

_SWITCHES: Final = """
    --perf --no-perf -e --escape --no-escape --check-tensors --offline --log-prefix --no-log-prefix --log-timestamps
    --no-log-timestamps --ignore-eos -bs --backend-sampling --spec-draft-backend-sampling
    --no-spec-draft-backend-sampling --cache-idle-slots --no-cache-idle-slots --context-shift --no-context-shift -sp
    --special --warmup --no-warmup --spm-infill -cb --cont-batching -nocb --no-cont-batching --mmproj-auto --no-mmproj
    --no-mmproj-auto --cors-credentials --no-cors-credentials --ui-mcp-proxy --webui-mcp-proxy --no-ui-mcp-proxy
    --no-webui-mcp-proxy -ag --agent -no-ag --no-agent --ui --webui --no-ui --no-webui --cache-prompt --no-cache-prompt
    --metrics --props --slots --no-slots --jinja --no-jinja --reasoning-preserve --no-reasoning-preserve
    --skip-chat-parsing --no-skip-chat-parsing --prefill-assistant --no-prefill-assistant --lora-init-without-apply
    --spec-default
"""

_ONE_VALUE: Final = """
    -t --threads -tb --threads-batch -C --cpu-mask -Cr --cpu-range --cpu-strict --prio --poll -Cb --cpu-mask-batch -Crb
    --cpu-range-batch --cpu-strict-batch --prio-batch --poll-batch -n --predict --n-predict --keep --rope-scaling
    --rope-scale --rope-freq-base --rope-freq-scale --yarn-orig-ctx --yarn-ext-factor --yarn-attn-factor
    --yarn-beta-slow --yarn-beta-fast -dt --defrag-thold --numa --lora-scaled --control-vector --control-vector-scaled
    --log-file --log-colors --samplers -s --seed --sampler-seq --sampling-seq --temp --temperature --top-k --top-p
    --min-p --top-nsigma --top-n-sigma --xtc-probability --xtc-threshold --typical --typical-p --repeat-last-n
    --repeat-penalty --presence-penalty --frequency-penalty --dry-multiplier --dry-base --dry-allowed-length
    --dry-penalty-last-n --dry-sequence-breaker --adaptive-target --adaptive-decay --dynatemp-range --dynatemp-exp
    --mirostat --mirostat-lr --mirostat-ent -l --logit-bias --grammar --grammar-file -j --json-schema -jf
    --json-schema-file --spec-draft-threads -td --threads-draft --spec-draft-threads-batch -tbd --threads-batch-draft
    --spec-draft-cpu-mask -Cd --cpu-mask-draft --spec-draft-cpu-range -Crd --cpu-range-draft --spec-draft-cpu-strict
    --cpu-strict-draft --spec-draft-prio --prio-draft --spec-draft-poll --poll-draft --spec-draft-cpu-mask-batch -Cbd
    --cpu-mask-batch-draft --spec-draft-cpu-strict-batch --cpu-strict-batch-draft --spec-draft-prio-batch
    --prio-batch-draft --spec-draft-poll-batch --poll-batch-draft --spec-draft-n-min --spec-synth-len --spec-synth-rates
    --spec-draft-p-split --draft-p-split --spec-draft-p-min --draft-p-min --spec-ngram-mod-n-min --spec-ngram-mod-n-max
    --spec-ngram-mod-n-match --spec-ngram-simple-size-n --spec-ngram-simple-size-m --spec-ngram-simple-min-hits
    --spec-ngram-map-k-size-n --spec-ngram-map-k-size-m --spec-ngram-map-k-min-hits --spec-ngram-map-k4v-size-n
    --spec-ngram-map-k4v-size-m --spec-ngram-map-k4v-min-hits -lcs --lookup-cache-static -lcd --lookup-cache-dynamic
    -cms --checkpoint-min-step -r --reverse-prompt -mmdev --mmproj-device --image-min-tokens --image-max-tokens
    --mtmd-batch-max-tokens --video-fps --video-timestamp-interval --video-ffmpeg-dir --tags --embd-normalize --path
    --cors-origins --cors-methods --cors-headers --ui-config --webui-config --ui-config-file --webui-config-file --tools
    --tools-runtime --mcp-servers-config --mcp-servers-json --chat-template-kwargs -to --timeout --sse-ping-interval
    --threads-http --cache-reuse --slot-save-path --media-path --reasoning-format -rea --reasoning --reasoning-effort
    --reasoning-budget --reasoning-budget-message --chat-template --chat-template-file -sps --slot-prompt-similarity
    --log-prompts-dir
"""

_TWO_VALUES: Final = "--control-vector-layer-range"

PASSED_ON: Final = MappingProxyType(
    {
        **dict.fromkeys(_SWITCHES.split(), 0),
        **dict.fromkeys(_ONE_VALUE.split(), 1),
        **dict.fromkeys(_TWO_VALUES.split(), 2),
    }
)
"""Flag -> number of values, for flags that llama-server gets as they were written."""

_UNCOUNTED: Final = """
    --control-vector --control-vector-scaled -bs --backend-sampling -mmdev --mmproj-device --image-min-tokens
    --image-max-tokens --mtmd-batch-max-tokens -lcs --lookup-cache-static -lcd --lookup-cache-dynamic
"""

UNCOUNTED: Final = frozenset(_UNCOUNTED.split())
"""Flags of ``PASSED_ON`` that do move some memory, which no figure of the plan includes. They earn a warning."""

_READS_THE_LOG: Final = "the supervisor reads the runner's log and sets its form"
_SUPERVISED: Final = (
    ("--host --port -a --alias --api-prefix", 1, "the supervisor decides how a runner is reached"),
    ("--reuse-port", 0, "the supervisor decides how a runner is reached"),
    ("--api-key --api-key-file", 1, "every runner gets a random key of its own; clients use PLANNER_API_KEYS"),
    (
        "--ssl-key-file --ssl-cert-file",
        1,
        "runners listen on loopback only; PLANNER_TLS_CERT is what makes planner serve speak TLS",
    ),
    (
        "-fit --fit -fitt --fit-target -fitc --fit-ctx",
        1,
        "the placement is planned here, with PLANNER_GPU_OVERHEAD as margin",
    ),
    ("-lv --verbosity --log-verbosity", 1, _READS_THE_LOG),
    ("-v --verbose --log-verbose --log-disable --log-jsonl --no-log-jsonl", 0, _READS_THE_LOG),
    (
        "--sleep-idle-seconds",
        1,
        "idle runners are stopped by PLANNER_KEEP_ALIVE, which gives all of their memory back",
    ),
)

LEFT_OUT: Final = MappingProxyType({name: (n, reason) for names, n, reason in _SUPERVISED for name in names.split()})
"""Flag -> number of values, and why a plan goes without it. A command line that has it can still be pasted."""

_REASONS: Final = (
    (
        "--models-dir --models-preset --models-max --models-autoload --no-models-autoload",
        "planner serve takes the router's place; its folder is PLANNER_MODELS",
    ),
    (
        """
        -mu --model-url -dr --docker-repo -hf -hfr --hf-repo -hff --hf-file -hft --hf-token -mmu --mmproj-url
        --spec-draft-hf -hfd -hfrd --hf-repo-draft --embd-gemma-default --fim-qwen-1.5b-default --fim-qwen-3b-default
        --fim-qwen-7b-default --fim-qwen-7b-spec --fim-qwen-14b-spec --fim-qwen-30b-default --gpt-oss-20b-default
        --gpt-oss-120b-default --vision-gemma-4b-default --vision-gemma-12b-default
        """,
        "nothing is downloaded here; give the path of a GGUF file",
    ),
    ("--list-devices", "use `planner devices`"),
    ("-cl --cache-list --completion-bash --usage", "it makes llama-server print and exit"),
    ("--draft --draft-n --draft-max", "llama.cpp has removed it; use --spec-draft-n-max"),
    ("--draft-min --draft-n-min", "llama.cpp has removed it; use --spec-draft-n-min"),
    (
        "--spec-ngram-size-n --spec-ngram-size-m --spec-ngram-min-hits",
        "llama.cpp has removed it; use the --spec-ngram-<kind>-... flag of your kind",
    ),
    (
        "--mmap --no-mmap --mlock --direct-io --no-direct-io",
        "llama.cpp has removed it; use --load-mode mmap, none, mlock or dio",
    ),
)

REFUSED: Final = MappingProxyType({name: reason for names, reason in _REASONS for name in names.split()})
"""Flag -> why it is not accepted."""
