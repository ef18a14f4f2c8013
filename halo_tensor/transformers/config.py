"""``HaloQuantConfig``: a ``HaloConfig`` as transformers passes configs around and writes them to ``config.json``."""

from dataclasses import fields
from inspect import Signature, signature
from typing import TYPE_CHECKING, Any, Self

from transformers.quantizers import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from halo_tensor.config import HaloConfig

METHOD = "halo"
#: Fields of HaloConfig that have one valid value in a model that is loaded quantised.
FIXED: dict[str, Any] = {
    "frozen": True, "memory": "speed", "keep_codes": True, "activations": None, "adapters": False,
}  # fmt: skip
#: The other fields. config.json has them.
FIELDS = tuple(name for name in signature(HaloConfig).parameters if name not in FIXED)


@register_quantization_config(METHOD)
class HaloQuantConfig(QuantizationConfigMixin):
    """HALO as a ``quantization_config`` of transformers' ``from_pretrained``, which then loads weights as codes.

    Its fields are those of :class:`~halo_tensor.HaloConfig`, with the same defaults, except ``frozen``, ``memory``,
    ``keep_codes``, ``activations`` and ``adapters``: a model that is loaded quantised holds its weights as codes only, and
    adapters come later. ``save_pretrained`` writes the fields to ``config.json``.

    The checkpoint may be plain, of this library, or released in 8 bits by others (``quant_method`` fp8 or compressed-tensors):
    its weights are then re-coded one by one, and ``model.halo_recoding`` says how close the codes are.

    Args:
        *args: ``level`` and ``dtype``, which may be positional.
        quant_method: "halo", by which transformers finds this class.
        frozen: False loads a model to train all of: each weight also has its high-precision value, as after ``quantize_``,
            and the model is saved plain.
        **given: ``level``, ``dtype``, ``granularity``, ``block_size``, ``seed``, ``skip`` and ``min_features``.

    Raises:
        ValueError: a field or a value is not valid (the message lists the valid ones), or ``dtype`` is "bf16", which has no
            codes.

    Example:
        >>> import tempfile, transformers
        >>> from halo_tensor.transformers import HaloQuantConfig
        >>> tiny = transformers.LlamaConfig(
        ...     vocab_size=64, hidden_size=128, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2
        ... )
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     transformers.LlamaForCausalLM(tiny).save_pretrained(folder)
        ...     config = HaloQuantConfig(level=1, dtype="int8")
        ...     model = transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
        >>> model.model.layers[0].mlp.up_proj.weight.codes.dtype
        torch.int8
    """

    __signature__ = Signature(
        [p.replace(default=True) if p.name == "frozen" else p for p in signature(HaloConfig).parameters.values()
         if p.name in (*FIELDS, "frozen")]
    )  # fmt: skip
    frozen = True

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """The fields, which ``__init__`` sets."""

    def __init__(self, *args: Any, quant_method: str = METHOD, frozen: bool = True, **given: Any):
        if quant_method != METHOD:
            raise ValueError(f"the quant_method of a HaloQuantConfig is {METHOD!r}; got {quant_method!r}")
        if unknown := [name for name in given if name not in FIELDS]:
            raise ValueError(f"HaloQuantConfig has no field {unknown[0]!r}; its fields are {', '.join(FIELDS)}")
        config = HaloConfig(*args, **given, **FIXED | {"frozen": frozen})
        if config.recipe.is_identity:
            raise ValueError(
                f"HaloQuantConfig quantises weights, and dtype {config.dtype!r} does not; load the model without it"
            )
        # The mixin writes all instance attributes to config.json.
        vars(self).update({name: getattr(config, name) for name in FIELDS}, quant_method=quant_method)
        if not frozen:  # such a model is saved plain, without this config
            self.frozen = False

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and vars(other) == vars(self)

    __hash__ = None  # type: ignore[assignment]  # attributes can be set

    def __repr__(self) -> str:
        shown = self._fields() | ({} if self.frozen else {"frozen": False})
        return f"HaloQuantConfig({', '.join(f'{name}={value!r}' for name, value in shown.items())})"

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Read the ``quantization_config`` of a checkpoint. transformers calls this.

        Args:
            config_dict: field -> value.
            return_unused_kwargs: whether the kwargs that are no field are returned too.
            **kwargs: values of fields that replace those of ``config_dict``.

        Returns:
            the config, or (config, unused kwargs).

        Raises:
            ValueError: it has a field that is not known, or a value that is not valid.
        """
        current = HaloConfig.present_fields(config_dict)
        known = (*FIELDS, "quant_method")
        if unknown := sorted(current.keys() - set(known)):
            raise ValueError(
                f"the quantization_config of this checkpoint has a field {unknown[0]!r} that this halo_tensor does not know "
                f"(it knows {', '.join(known)}). Load it with the version that wrote it, or upgrade"
            )
        return super().from_dict(current, return_unused_kwargs, **kwargs)

    @classmethod
    def from_halo_config(cls, config: HaloConfig) -> Self:
        """Return the same method for ``from_pretrained``.

        Args:
            config: for ``quantize_``, of :func:`~halo_tensor.halo_config`.

        Raises:
            ValueError: ``config`` says otherwise than that weights are held as codes only, or has no codes.
        """
        for f in fields(config):
            if f.name in FIXED.keys() - {"frozen"} and getattr(config, f.name) not in (f.default, FIXED[f.name]):
                raise ValueError(
                    f"a model that is loaded quantised has {f.name}={FIXED[f.name]}; got {getattr(config, f.name)}"
                )
        return cls(**{name: getattr(config, name) for name in FIELDS}, frozen=config.frozen is not False)

    @property
    def halo_config(self) -> HaloConfig:
        """The same method as a config for ``quantize_``, with weights as ``frozen`` says."""
        return HaloConfig(**self._fields(), **FIXED | {"frozen": self.frozen})

    def _fields(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in FIELDS}
