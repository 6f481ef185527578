"""LabRecord: the mirror of the labs that live on the workers' CMLs, and their deletion."""
