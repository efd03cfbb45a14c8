"""What users type of each command: the examples at the end of its help."""

# by command; a line that is indented goes on with the one before
EXAMPLES = {
    "diff": [
        "skillvec diff rl_ckpt sft_ckpt -o skill.safetensors",
        "skillvec diff org/model-rl org/model-sft -o skill.safetensors --stream",
    ],
    "combine": [
        "skillvec combine a.safetensors=0.7 b.safetensors=-0.3 -o c.safetensors",
        "skillvec combine a.safetensors b.safetensors --op ties \\",
        "    --param density=0.3 -o c.safetensors",
    ],
    "apply": [
        "skillvec apply target_sft skill.safetensors -o merged --lam 0.8",
        "skillvec apply target_sft a.safetensors=0.7 b.safetensors=0.3 \\",
        "    --op ties -o merged",
        "skillvec apply target_sft --tuned rl_ckpt --base sft_ckpt -o merged",
    ],
    "import-patch": ["skillvec import-patch step_400.safetensors sft_ckpt -o skill.safetensors"],
    "export-patch": ["skillvec export-patch skill.safetensors --form vllm -o step_400.safetensors"],
    "extract-lora": [
        "skillvec extract-lora skill.safetensors --rank 64 -o adapter",
        "skillvec extract-lora skill.safetensors --energy 0.9 -o adapter",
    ],
    "push": [
        "skillvec push skill.safetensors org/math-skill --license apache-2.0",
        "skillvec push merged org/model-with-math --create-pr",
    ],
    "pull": ["skillvec pull org/math-skill -o skill.safetensors"],
    "orthogonality": [
        "skillvec orthogonality skill.safetensors sft_ckpt::base -o report",
        "skillvec orthogonality a.safetensors b.safetensors --control random",
    ],
    "norms": ["skillvec norms skill.safetensors --against sft_ckpt -o report"],
    "inspect": [
        "skillvec inspect skill.safetensors",
        "skillvec inspect skill.safetensors --target target_sft",
    ],
    "verify": [
        "skillvec verify merged",
        "skillvec verify skill.safetensors --base sft_ckpt --tuned rl_ckpt",
    ],
    "sweep": [
        "skillvec sweep target_sft skill.safetensors --eval my_module:score -o report",
        "skillvec sweep target_sft a.safetensors=0.7 b.safetensors=-0.3 \\",
        "    --lam 0:1:0.1 --control random --eval lm-eval:my_task -o report",
    ],
    "search": [
        "skillvec search target_sft skill.safetensors --eval my_module:score \\",
        '    --space "lam=0:2 by=layers:4" --budget 60 -o found',
    ],
    "help": [
        "skillvec help",
        "skillvec help apply",
    ],
    "completion": [
        "skillvec completion --install",
        "skillvec completion zsh",
    ],
}
