"""`GET /inventory`: what is loaded."""

from typing import Annotated

from fastapi import APIRouter, Depends

from polyhead.server.http.schemas import InventoryAnswer
from polyhead.server.http.service import Service, the_service

router = APIRouter()


@router.get("/inventory", response_model=InventoryAnswer)
async def inventory(service: Annotated[Service, Depends(the_service)]) -> InventoryAnswer:
    """The backbone and the shared skills that this server answers with."""
    header = service.inventory.header
    return InventoryAnswer(
        backbone=header.backbone.name,
        kind="causal" if service.tokenizer.decoder_start is None else "encoder-decoder",
        modules=[module.name for module in header.modules],
        heads=header.heads,
        skills=header.skills,
        rank=header.rank,
        fingerprint=service.inventory.fingerprint,
        quantize=service.settings.quantize,
        contexts=service.inventory.generator is not None,
    )
