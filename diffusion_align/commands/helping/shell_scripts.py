"""``diffusion-align completion``: scripts for bash, zsh and fish."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType

from diffusion_align.commands.console import conclude
from diffusion_align.shipped import SHIPPED_MODELS, SHIPPED_PAIRS
from diffusion_align.training.settings import known_recipes

from .command_tree import Flag, command_tree
from .helping_options import CompletionOptions

#: Values of flags that are names of what comes with the package.
NAMES: Mapping[str, Callable[[], tuple[str, ...]]] = MappingProxyType({
    "--model": lambda: SHIPPED_MODELS, "--dataset": lambda: SHIPPED_PAIRS,
    "--config": lambda: tuple(known_recipes()), "--name": lambda: tuple(known_recipes()),
})  # fmt: skip


def bash(tree: Mapping[str, list[Flag]]) -> str:
    """A function and its registration."""
    cases = []
    for words, flags in tree.items():
        values = "".join(
            f'      {flag.name}) COMPREPLY=($(compgen -W \'{" ".join(found)}\' -- "$cur") $(compgen -f -- "$cur")); '
            "return ;;\n"
            for flag in flags
            if (found := known_values(flag))
        )
        shown = f'    case "$prev" in\n{values}    esac\n' if values else ""
        cases.append(f"  '{words}')\n{shown}    words='{' '.join(flag.name for flag in flags)}' ;;\n")
    nexts = "".join(f"  '{words}') words='{' '.join(found)}' ;;\n" for words, found in following(tree).items() if words)
    return f"""# Completion of diffusion-align for bash.
_diffusion_align() {{
  local cur="${{COMP_WORDS[COMP_CWORD]}}" prev="${{COMP_WORDS[COMP_CWORD-1]}}"
  local one="${{COMP_WORDS[1]}}" words='' place=''
  COMPREPLY=()
  if [ "$COMP_CWORD" -eq 1 ]; then
    COMPREPLY=($(compgen -W '{" ".join(following(tree)[""])} --help --version' -- "$cur")); return
  fi
  case "$one" in
{nexts}  esac
  if [ "$COMP_CWORD" -eq 2 ] && [ -n "$words" ] && [ "${{cur#-}}" = "$cur" ]; then
    COMPREPLY=($(compgen -W "$words" -- "$cur") $(compgen -f -- "$cur")); return
  fi
  place="$one"
  case " $words " in *" ${{COMP_WORDS[2]}} "*) place="$one ${{COMP_WORDS[2]}}" ;; esac
  words=''
  case "$place" in
{"".join(cases)}  esac
  if [ "${{cur#-}}" != "$cur" ]; then
    COMPREPLY=($(compgen -W "$words --help --json --quiet" -- "$cur"))
  else
    COMPREPLY=($(compgen -f -- "$cur"))
  fi
}}
complete -o filenames -F _diffusion_align diffusion-align
"""


def zsh(tree: Mapping[str, list[Flag]]) -> str:
    """Bash's function, by zsh's own way to run it."""
    return f"# Completion of diffusion-align for zsh.\nautoload -Uz +X bashcompinit && bashcompinit\n{bash(tree)}"


def fish(tree: Mapping[str, list[Flag]]) -> str:
    """A line for each word and flag."""
    return "# Completion of diffusion-align for fish.\n" + "".join(f"{line}\n" for line in _fish_lines(tree))


def _fish_lines(tree: Mapping[str, list[Flag]]) -> Iterator[str]:
    start = "complete -c diffusion-align"
    after = following(tree)
    yield f"{start} -n __fish_use_subcommand -f -a '{' '.join(after[''])}'"
    for words, found in after.items():
        if words:
            others = " ".join(found)
            yield (
                f"{start} -n '__fish_seen_subcommand_from {words}; and not __fish_seen_subcommand_from {others}' "
                f"-f -a '{others}'"
            )
    for words, flags in tree.items():
        where = "; and ".join(f"__fish_seen_subcommand_from {word}" for word in words.split())
        for flag in flags:
            values = known_values(flag)
            takes = "" if flag.is_switch else " -r" + (f" -a '{' '.join(values)}'" if values else "")
            yield f"{start} -n '{where}' -l {flag.name.removeprefix('--')}{takes}"


def following(tree: Mapping[str, list[Flag]]) -> dict[str, list[str]]:
    """Words that may follow each word, and first of all ""."""
    found: dict[str, list[str]] = {"": list(dict.fromkeys(words.split()[0] for words in tree))}
    for words in tree:
        first, _, second = words.partition(" ")
        if second:
            found.setdefault(first, []).append(second)
    return found


def known_values(flag: Flag) -> tuple[str, ...]:
    """Values that can be told beforehand."""
    return flag.values or (NAMES[flag.name]() if flag.name in NAMES else ())


def run(options: CompletionOptions) -> int:
    """Print the script; returns the exit status."""
    script = {"bash": bash, "zsh": zsh, "fish": fish}[options.shell](command_tree())
    conclude(script.rstrip("\n"), {"script": script})
    return 0
