"""A repository of the hub: its files are fetched as they are asked for, and never twice."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from shards.errors import UserError

WANTED_MODEL = "a diffusers model folder or a hub id (owner/name or owner/name@revision)"
_HUB_ID = re.compile(r"(?P<repository>[^/@.][^/@]*/[^/@]+)(@(?P<revision>.+))?")
_USE_A_FOLDER = "--model <folder>; the embedded one is examples/tiny-model"


@dataclass(frozen=True)
class HubRepository:
    """A model repository at one revision.

    Args:
        name: as the user gave it.
        repository: `owner/name`.
        revision: branch, tag or commit; None is the default branch.
    """

    name: str
    repository: str
    revision: str | None

    @classmethod
    def parse(cls, name: str) -> HubRepository | None:
        """`owner/name` or `owner/name@revision`; None where it is neither."""
        match = _HUB_ID.fullmatch(name)
        return cls(name, match["repository"], match["revision"]) if match else None

    def fetch(self, patterns: list[str]) -> Path:
        """The local folder, with at least the files that match.

        Raises:
            UserError: they cannot be had.
        """
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, HTTPError

        try:
            return Path(
                snapshot_download(self.repository, revision=self.revision, allow_patterns=patterns)
            )
        except (HTTPError, HFValidationError, OSError) as error:
            reason, remedy = self._explain(error)
            raise UserError(
                self.name,
                f"no such folder, and not to be had from the hub ({reason})",
                wanted=WANTED_MODEL,
                remedy=remedy,
            ) from None

    def pinned(self, snapshot: Path) -> HubRepository:
        """The repository at the commit of a snapshot, whatever its branch does meanwhile."""
        return replace(self, revision=snapshot.name)

    def _explain(self, error: Exception) -> tuple[str, str]:
        """Why it cannot be had, and what to do."""
        from huggingface_hub import errors

        if isinstance(error, errors.GatedRepoError):
            remedy = "accept its licence on its page, then `hf auth login` or HF_TOKEN"
            return "it is gated", f"{remedy}; or {_USE_A_FOLDER}"
        if isinstance(error, errors.RepositoryNotFoundError):
            remedy = "check the spelling; a private one wants `hf auth login` or HF_TOKEN"
            return "it has no such repository", f"{remedy}; or {_USE_A_FOLDER}"
        if isinstance(error, errors.RevisionNotFoundError):
            return f"no revision {self.revision}", "a branch, tag or commit of it"
        if isinstance(error, errors.LocalEntryNotFoundError):
            return "it cannot be reached, and its local cache lacks files", _USE_A_FOLDER
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return first_line, _USE_A_FOLDER
