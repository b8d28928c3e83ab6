"""What is measured of generated and reconstructed images: extractors, generation figures, alias and detail metrics."""

from fvar_lightning.data.pixels import to_uint8
from fvar_lightning.metrics.alias import AliasEnergyRatio, ShiftEquivariance
from fvar_lightning.metrics.charts import (
    edge_mtf,
    fine_text,
    moire_energy,
    mtf50,
    siemens_star,
    slanted_edge,
    zone_plate,
)
from fvar_lightning.metrics.extractors import (
    EfficientNetLite0,
    FeatureExtractor,
    Inception,
    ModuleExtractor,
)
from fvar_lightning.metrics.generation import (
    Figures,
    frechet_distance,
    generation_figures,
    inception_score,
    kernel_distance,
    precision_recall,
)
from fvar_lightning.metrics.legibility import rapid_ocr, render_words, text_legibility
from fvar_lightning.metrics.spectra import GridArtifact, RadialSpectrumDistance
from fvar_lightning.metrics.statistics import FeatureStatistics, Statistics, adm_images, statistics_file

__all__ = [
    "AliasEnergyRatio",
    "EfficientNetLite0",
    "FeatureExtractor",
    "FeatureStatistics",
    "Figures",
    "GridArtifact",
    "Inception",
    "ModuleExtractor",
    "RadialSpectrumDistance",
    "ShiftEquivariance",
    "Statistics",
    "adm_images",
    "edge_mtf",
    "fine_text",
    "frechet_distance",
    "generation_figures",
    "inception_score",
    "kernel_distance",
    "moire_energy",
    "mtf50",
    "precision_recall",
    "rapid_ocr",
    "render_words",
    "siemens_star",
    "slanted_edge",
    "statistics_file",
    "text_legibility",
    "to_uint8",
    "zone_plate",
]
