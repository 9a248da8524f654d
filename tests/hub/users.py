"""Who there is on the loopback Hub."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class User:
    """Who a token belongs to, and what it allows: `read`, `write` or `fineGrained` (which may write nothing here)."""

    name: str
    role: str = "write"
    organisations: dict[str, str] = field(default_factory=dict)  # name -> role in it


USERS = {
    "hf_ownerWritesThisTokenIsForTests000001": User("owner", organisations={"lab": "write", "club": "read"}),
    "hf_ownerReadsThisTokenIsForTests00000002": User("owner", role="read"),
    "hf_ownerFineGrainedTokenIsForTests000003": User("owner", role="fineGrained"),
    "hf_otherWritesThisTokenIsForTests0000004": User("other"),
}
