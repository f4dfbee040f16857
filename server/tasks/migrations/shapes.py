"""Shapes of columns as the migrations use them. A shape that changes gets another name: what a
migration once built must stay what it was."""

import sqlalchemy as sa

task_id = sa.String(128).with_variant(sa.String(128, collation="C"), "postgresql")
digest = sa.String(64)
moment = sa.DateTime(timezone=True)
sequence = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
