"""What can be wrong with adapters.

AdapterError            base; carries the field, what was found and what was expected
├── RoutingError        a routing's shape, numbers or encoding
├── InventoryError      an inventory folder, its header or its tensors
│   └── BackboneMismatch  a sound inventory, made for another backbone
├── PrivateAdapterError a private adapter's shapes, numbers or encoding
├── InjectionError      the backbone cannot take these adapters
├── PlanError           a forward pass was planned wrongly (a programming error)
└── ConversionError     a foreign checkpoint holds something that is not implemented
"""


class AdapterError(ValueError):
    """Base of everything `adapters` raises on purpose.

    `field` is the dotted path of the offending value, relative to what the caller handed over.
    `message` is what is wrong without the other three, for whoever shows those apart.
    """

    def __init__(
        self, message: str, *, field: str = "", found: str = "", expected: str = ""
    ) -> None:
        self.message = message
        self.field = field
        self.found = found
        self.expected = expected
        parts = [message]
        if expected:
            parts.append(f"expected {expected}")
        if found:
            parts.append(f"found {found}")
        text = "; ".join(parts)
        super().__init__(f"{field}: {text}" if field else text)


class RoutingError(AdapterError):
    """A routing that does not fit the inventory or holds numbers that cannot be weights."""


class InventoryError(AdapterError):
    """An inventory that cannot be read, or whose header and tensors disagree."""


class BackboneMismatch(InventoryError):
    """A sound inventory that was made for another backbone."""


class PrivateAdapterError(AdapterError):
    """A private adapter that does not fit the backbone's modules."""


class InjectionError(AdapterError):
    """The backbone has no such modules, or their features cannot be split into heads."""


class PlanError(AdapterError):
    """A forward pass whose plan is missing, nested or of another length than its tokens."""


class ConversionError(AdapterError):
    """A foreign checkpoint that uses something Polyhead does not implement, named here."""
