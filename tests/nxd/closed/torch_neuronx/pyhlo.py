"""XLA's messages (xla/service/hlo.proto, xla/xla_data.proto): the fields that NxD or these stand-ins read.

Other fields stay in a message as they are.
"""

from __future__ import annotations

from types import SimpleNamespace

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from tools.ports.closed import inert

# type and number of each field; [] for a repeated one
MESSAGES = {
    "ShapeProto": {"element_type": ("int32", 2), "tuple_shapes": ("[ShapeProto]", 4)},
    "ProgramShapeProto": {
        "parameters": ("[ShapeProto]", 1),
        "result": ("ShapeProto", 2),
        "parameter_names": ("[string]", 3),
    },
    "HloInstructionProto": {
        "name": ("string", 1),
        "opcode": ("string", 2),
        "shape": ("ShapeProto", 3),
        "parameter_number": ("int64", 9),
        "dimensions": ("[int64]", 14),
        "custom_call_target": ("string", 28),
        "id": ("int64", 35),
        "operand_ids": ("[int64]", 36),
        "called_computation_ids": ("[int64]", 38),
    },
    "HloComputationProto": {
        "name": ("string", 1),
        "instructions": ("[HloInstructionProto]", 2),
        "program_shape": ("ProgramShapeProto", 4),
        "id": ("int64", 5),
        "root_id": ("int64", 6),
    },
    "HloModuleProto": {
        "name": ("string", 1),
        "entry_computation_name": ("string", 2),
        "computations": ("[HloComputationProto]", 3),
        "host_program_shape": ("ProgramShapeProto", 4),
        "id": ("int64", 5),
        "entry_computation_id": ("int64", 6),
    },
}
TUPLE = 13  # PrimitiveType.TUPLE


def message_classes() -> dict[str, type]:
    field_type = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="stand_in.proto", package="xla", syntax="proto3")
    for message_name, fields in MESSAGES.items():
        message = file.message_type.add(name=message_name)
        for name, (kind, number) in fields.items():
            field = message.field.add(name=name, number=number, label=field_type.LABEL_OPTIONAL)
            if kind.startswith("["):
                field.label = field_type.LABEL_REPEATED
                kind = kind.strip("[]")
            if kind in MESSAGES:
                field.type, field.type_name = field_type.TYPE_MESSAGE, f".xla.{kind}"
            else:
                field.type = getattr(field_type, f"TYPE_{kind.upper()}")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"xla.{name}")) for name in MESSAGES}


hlo_pb2 = SimpleNamespace(**message_classes())
xla_data_pb2 = inert.Inert
